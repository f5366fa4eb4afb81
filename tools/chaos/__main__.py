"""Kills every process of a service at random, for minutes, under streams whose every token is compared.

python -m tools.chaos --minutes 10 --json benchmarks/results/chaos.json

A real `pagewire serve` with two frontends over the null engine, whose text is given by seed and position.
Its answers to a set of requests are taken down while nothing happens. Then streams ask for them again and
again, half over gRPC and half over HTTP, each time over a new connection, while workers, schedulers and
frontends are killed with SIGKILL, and workers stopped with SIGSTOP as if they hung, at the times of a
Poisson process, now and then two at once. A client repeats a request only if it was on a frontend that was
killed. Status 1 if any other request failed, if a token was lost, repeated or another one, if a request was
quarantined, if a process died that was not struck, or if blocks, segments, sockets, processes or
descriptors are left when everything is at rest.

`-tp` and `-pp` have a model's ranks killed and stopped, too: `python -m tools.chaos --engine tiny -tp 2`.

`--engine tiny` has a tiny model of random weights (see tools/fuzz_service.py), any other name is a model's;
then half of the requests are greedy. Such workers take longer to start, so choose a longer --mean-interval:
where no engine is there for thirty seconds new requests are refused, which counts as failed here.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from pagewire.bench.record import describe_run, write_record
from tools.chaos import remains
from tools.chaos.run import STEP_TIMEOUT, chaos, faults, start
from tools.chaos.strikes import Strikes
from tools.service import Service

RECOVER_SECONDS = 10.0


def run(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, from the start of the service to what is left when it has stopped."""
    service = start(
        directory,
        arguments.engine,
        arguments.streams,
        arguments.step_timeout,
        arguments.replicas,
        (arguments.tensor_parallel_size, arguments.pipeline_parallel_size),
    )
    try:
        results = asyncio.run(cause(service, arguments))
    finally:
        status = service.stop()
        if arguments.log is not None:
            arguments.log.write_text(service.log)
    results["faults"]["exit_status"] = [] if status == 0 else [str(status)]
    results["faults"]["left_named_segments"] = remains.named_segments(service)
    return results


async def cause(service: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    """Random strikes for as long as is asked, and some time to recover from the last."""

    async def disturb(strikes: Strikes) -> None:
        await strikes.at_random(arguments.minutes * 60, arguments.mean_interval)
        await asyncio.sleep(RECOVER_SECONDS)

    return await chaos(
        service,
        disturb,
        num_streams=arguments.streams,
        seed=arguments.seed,
        greedy=arguments.engine != "null",
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def main() -> int:
    """The exit status: 0 if there was no fault."""
    parser = record.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--mean-interval", type=float, default=5.0, help="seconds between strikes")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=1, help="with several, whole ones are killed too")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1, help="not with the null engine")
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1, help="likewise")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default="null", help='"null", "tiny" or a model')
    parser.add_argument(
        "--step-timeout", type=float, default=STEP_TIMEOUT, help="seconds after which a worker hangs"
    )
    parser.add_argument("--log", type=Path, help="write the service's log to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = run(Path(directory), arguments)
    record.write(None, results)
    if arguments.json is not None:
        write_record(arguments.json, {**describe_run("chaos", "python -m tools.chaos"), "results": results})
    found = faults(results)
    print(
        f"{sum(results['answered'].values())} requests, {sum(results['strikes'].values())} strikes; ", end=""
    )
    print("; ".join(f"{len(each)} of {kind}" for kind, each in found.items()) or "no fault")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
