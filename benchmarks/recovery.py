"""How long open streams pause when a process behind them is killed.

A real `pagewire serve` with open streams of 64 tokens of prompt and 16 of output, before the null engine
(what processes cost) and before SmolLM2. In turns the worker and the scheduler are killed with SIGKILL; what
counts is the time from the kill to the next token, of the stream that goes on first and of the one that goes
on last. Tokens that come within 50 ms of the kill were on their way already and do not count. Between two
kills of a process it runs for longer than the supervisor's back-off remembers. The processor time is the
successor's, until the last stream goes on; how busy the machine was meanwhile is told with it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from benchmarks import record
from benchmarks.requests import greedy, prompt
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.supervisor.child import STABLE_SECONDS
from tools.service import Service

IN_TRANSIT_SECONDS = 0.05
PROMPT_TOKENS, TOKENS_BEFORE, MAX_TOKENS = 64, 16, 2000
RECOVER_SECONDS = 120.0
ROLES = ("engine-worker", "scheduler")
OPTIONS: dict[str, tuple[str, ...]] = {"null": ("--engine", "null", "--null-step-ms", "10"), "model": ()}


class Streams:
    """Greedy streams, and when each gained tokens."""

    def __init__(self, channel: grpc.aio.Channel, count: int, salt: int) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.arrivals: list[list[float]] = [[] for _ in range(count)]
        self.failures: list[str] = []
        self._tasks = [asyncio.create_task(self._stream(index, salt + index)) for index in range(count)]

    async def _stream(self, index: int, salt: int) -> None:
        request = greedy(prompt(PROMPT_TOKENS, salt), MAX_TOKENS)
        try:
            async for event in self._stub.Generate(request):
                if event.HasField("delta"):
                    self.arrivals[index].append(time.monotonic())
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{error.code().name}: {error.details()}")

    async def until_each_has(self, count: int) -> None:
        """Returns when every stream has gained so many tokens."""
        while True:
            if all(len(times) >= count for times in self.arrivals):
                return
            await asyncio.sleep(0.005)

    async def next_tokens(self, after: float) -> list[float]:
        """When each stream first gained a token after this time."""
        deadline = time.monotonic() + RECOVER_SECONDS
        while True:
            firsts = [next((at for at in times if at > after), None) for times in self.arrivals]
            found = [at for at in firsts if at is not None]
            if len(found) == len(firsts):
                return found
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(firsts) - len(found)} streams did not go on; {self.failures}")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Drops the streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def kill_once(service: Service, streams: Streams, role: str) -> dict[str, float]:
    """Kills a process; seconds until the first and the last stream goes on, and of processor time."""
    os.kill(service.processes()[role].pid, signal.SIGKILL)
    killed = time.monotonic()
    times = await streams.next_tokens(killed + IN_TRANSIT_SECONDS)
    successor = service.processes()[role]
    return {
        "first_s": round(min(times) - killed, 3),
        "last_s": round(max(times) - killed, 3),
        "successor_processor_s": round(sum(successor.cpu_times()[:2]), 2),
        "load_average": os.getloadavg()[0],
    }


async def measure(service: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    """All kills."""
    kills: dict[str, list[dict[str, float]]] = {role: [] for role in ROLES}
    failures: list[str] = []
    async with grpc.aio.insecure_channel(service.grpc_target) as channel:
        for turn in range(arguments.kills * len(ROLES)):
            role = ROLES[turn % len(ROLES)]
            await asyncio.sleep(STABLE_SECONDS / len(ROLES) + 1)
            streams = Streams(channel, arguments.streams, turn * arguments.streams)
            await streams.until_each_has(TOKENS_BEFORE)
            kills[role].append(await kill_once(service, streams, role))
            print(role, kills[role][-1], flush=True)
            await streams.close()
            failures += streams.failures
    return {
        **{role: {"kills": len(kills[role]), **summary(kills[role])} for role in ROLES},
        "failed_requests": failures,
        "streams": arguments.streams,
    }


def summary(kills: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median and worst over all kills."""
    return {
        f"{name}_{label}": round(of([kill[name] for kill in kills]), 3)
        for name in ("first_s", "last_s", "successor_processor_s", "load_average")
        for label, of in (("median", statistics.median), ("worst", max))
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each process")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--engines", default=",".join(OPTIONS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for engine in arguments.engines.split(","):
        with (
            tempfile.TemporaryDirectory() as directory,
            Service(Path(directory), options=OPTIONS[engine]) as service,
        ):
            results[engine] = asyncio.run(measure(service, arguments))
        record.write(arguments.json, results)


if __name__ == "__main__":
    main()
