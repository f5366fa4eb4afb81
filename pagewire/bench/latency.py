"""How long each request waits: for its first token, for each token after it, and for the whole answer."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from pagewire.bench.engine import Batch, BenchEngine
from pagewire.bench.percentiles import spread
from pagewire.bench.workloads import Workload
from scheduler.step import StepOutput


def measure_latency(
    engine: BenchEngine, workload: Workload, *, batch_size: int | None, repeat: int
) -> dict[str, Any]:
    """Runs a workload `repeat` times in batches, each handed over at once when the one before it has ended.

    Args:
        batch_size: requests in a batch; None hands over the whole workload.

    Returns:
        Over all requests of all runs, in milliseconds: `ttft` from the batch's start to the first token,
        `tpot` mean time of a token after the first, `itl` gaps between tokens, `e2e` from the batch's start
        to the last token. Each with mean, percentiles and maximum; without those a workload cannot have.
    """
    engine.use_prefix_caching(workload.prefix_caching)
    samples: dict[str, list[float]] = defaultdict(list)
    for round_ in range(1, repeat + 1):
        for batch in _batches(engine.batch(workload, round_), batch_size or workload.num_requests):
            _measure_batch(engine, batch, samples)
    return {
        "workload": str(workload),
        "batch_size": min(batch_size or workload.num_requests, workload.num_requests),
        "num_requests": workload.num_requests * repeat,
        "prefix_caching": workload.prefix_caching,
        **{f"{name}_ms": spread(values) for name, values in samples.items()},
    }


def _batches(whole: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(whole.prompts), size):
        part = slice(start, start + size)
        yield Batch(whole.prompts[part], whole.output_lens[part])


def _measure_batch(engine: BenchEngine, batch: Batch, samples: dict[str, list[float]]) -> None:
    times: dict[str, list[float]] = defaultdict(list)

    def on_step(now: float, output: StepOutput) -> None:
        for request, _ in output.tokens:
            times[request.request_id].append(now)

    measured = engine.run(batch, on_step)
    for output in measured.outputs:
        known = times[output.request_id]
        samples["ttft"].append(known[0] - measured.began)
        if len(known) > 1:
            samples["tpot"].append((known[-1] - known[0]) / (len(known) - 1))
            samples["itl"] += [after - before for before, after in itertools.pairwise(known)]
        samples["e2e"].append(known[-1] - measured.began)
