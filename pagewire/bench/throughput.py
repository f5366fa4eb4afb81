"""Tokens a second when all requests of a workload are there at once."""

from __future__ import annotations

import statistics
from typing import Any

from pagewire.bench.engine import BenchEngine
from pagewire.bench.workloads import Workload


def measure_throughput(engine: BenchEngine, workload: Workload, repeat: int) -> dict[str, Any]:
    """Runs a workload `repeat` times, with fresh prompts each time.

    Returns:
        Its shape in numbers, `runs` with every run's figures, `tokens_per_s`, the median of what the workload
        counts (output tokens, or input tokens where nothing else is generated), and `steps`, the steps of
        the run in the middle.
    """
    engine.use_prefix_caching(workload.prefix_caching)
    lengths = workload.lengths()
    input_tokens = sum(workload.shared_prefix + prompt for prompt, _ in lengths)
    output_tokens = sum(output for _, output in lengths)
    runs: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for round_ in range(1, repeat + 1):
        measured = engine.run(engine.batch(workload, round_))
        steps.append(measured.steps)
        runs.append(
            {
                "seconds": round(measured.seconds, 4),
                "output_tokens_per_s": round(output_tokens / measured.seconds, 1),
                "input_tokens_per_s": round(input_tokens / measured.seconds, 1),
                **{
                    name: measured.steps[name]
                    for name in ("num_steps", "num_preemptions", "prefix_cache_hits")
                },
            }
        )
    unit = "input_tokens_per_s" if workload.counts_input else "output_tokens_per_s"
    middle = sorted(range(repeat), key=lambda index: runs[index][unit])[repeat // 2]
    return {
        "workload": str(workload),
        "num_requests": workload.num_requests,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "prefix_caching": workload.prefix_caching,
        "unit": unit,
        "tokens_per_s": statistics.median(run[unit] for run in runs),
        "runs": runs,
        "steps": steps[middle],
    }
