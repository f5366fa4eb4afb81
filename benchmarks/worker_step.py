"""What a step costs the worker's processor, part by part, with 256 requests decoding on a GPU.

The real core plans, the real runner executes; records are encoded and decoded as in the rings. A step's total
is everything from the plan's record to the launch of its work, and from its finished copy to the result's
record; the device computes meanwhile. The model is small, since the host's work does not depend on it.
"""

from __future__ import annotations

import json
import tempfile
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks import record
from engine.config import WorkerConfig
from engine.cuda import runner as cuda_runner
from engine.cuda.results import LaunchedStep, ResultBuffers
from engine.cuda.rows import DeviceRows
from engine.cuda.runner import CudaModelRunner
from engine.cuda.sampling_extras import SamplingExtras
from engine.dispatch.records import decode_plan, encode_plan, encode_result
from engine.dispatch.sampling import SamplingRecord
from engine.worker.build import build_worker
from scheduler.core import Scheduler
from scheduler.request import Request

NUM_REQUESTS = 256
NUM_STEPS = 400
WARM_UP = 50
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PARTS = (
    (DeviceRows, "apply"),
    (DeviceRows, "check_schedule"),
    (DeviceRows, "shared_prefix"),
    (cuda_runner, "lay_out"),
    (CudaModelRunner, "_fill"),
    (CudaModelRunner, "_send"),
    (cuda_runner.StepGraphs, "replay"),
    (SamplingExtras, "after_sampling"),
    (ResultBuffers, "begin"),
    (ResultBuffers, "collect"),
)


def main() -> None:
    args = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    sampled = SamplingRecord(temperature=0.8, top_p=0.9, seed=1)
    record.write(
        args.json,
        {
            "device": torch.cuda.get_device_name(),
            "greedy": measure(SamplingRecord(temperature=0.0)),
            "sampled with top_p": measure(sampled),
            "one request": measure(SamplingRecord(temperature=0.0), num_requests=1),
        },
    )


def measure(sampling: SamplingRecord, num_requests: int = NUM_REQUESTS) -> dict[str, float]:
    """Medians over steps, microseconds."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        worker = build_worker(
            WorkerConfig(model=directory, socket=Path("unused"), device="cuda", load_format="dummy")
        )
    core = Scheduler(worker.facts.limits)
    for index in range(num_requests):
        prompt = array("I", [index + 3] * 128)
        core.add(Request(str(index), prompt, len(prompt), sampling, 128 + NUM_STEPS + WARM_UP))
    steps: list[dict[str, float]] = []
    pending: deque[LaunchedStep] = deque()
    with watched(steps):
        while (plan := core.schedule()) is not None or pending:
            if plan is not None:
                steps.append(defaultdict(float))
                encoded = encode_plan(plan)
                decoded = timed(steps, "decode_plan", decode_plan, encoded)
                pending.append(timed(steps, "launch", worker.runner.launch, decoded))
            if len(pending) == 2 or plan is None:
                launched = pending.popleft()
                while not launched.done():
                    time.sleep(20e-6)
                result = timed(steps, "result", launched.result)
                timed(steps, "encode_result", encode_result, result)
                core.update(result)
    kept = steps[WARM_UP:-5]
    parts = {name: round(median(step[name] for step in kept) * 1e6, 1) for name in kept[0]}
    whole = ("decode_plan", "launch", "result", "encode_result")
    totals = sorted(sum(step[name] for name in whole) * 1e6 for step in kept)
    return {
        "total": round(median(totals), 1),
        "total_p99": round(totals[int(0.99 * len(totals))], 1),
        **parts,
    }


def timed(steps: list[dict[str, float]], name: str, function, *arguments):  # type: ignore[no-untyped-def]
    begun = time.perf_counter()
    value = function(*arguments)
    steps[-1][name] += time.perf_counter() - begun
    return value


@contextmanager
def watched(steps: list[dict[str, float]]) -> Iterator[None]:
    """Times the parts of a launch."""
    patches = []
    for owner, name in PARTS:
        function = getattr(owner, name)

        def wrapper(*args, _function=function, _name=f"launch.{name}", **kwargs):  # type: ignore[no-untyped-def]
            if not steps:
                return _function(*args, **kwargs)
            begun = time.perf_counter()
            value = _function(*args, **kwargs)
            steps[-1][_name] += time.perf_counter() - begun
            return value

        patches.append(mock.patch.object(owner, name, wraps(function)(wrapper)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    main()
