"""What adapters cost on a GPU: decodes of the 8B Llama shape with dummy weights, beside the base in one run.

W1-like: 256 requests decode, an eighth of them with each of 8 adapters of rank 32; goal: 85 % of the base's
tokens/s. W3-like: one request decodes, with one adapter; goal: 92 %. The real core plans, the real runner
executes, one step ahead, with graphs. Base and adapters take turns, so that a change of clocks touches both.

    python -m benchmarks.adapters --json benchmarks/results/adapters-h200.json
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import record
from engine.config import WorkerConfig
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.sampling import SamplingRecord
from engine.layers.linear import LinearLayer
from engine.lora.host import AdapterHost
from engine.step.runner import PendingStep
from engine.worker.build import build_worker
from pagewire.bench.shapes import shape_directory
from scheduler.core import Scheduler
from scheduler.request import Request

NUM_ADAPTERS, RANK = 8, 32
WARM_UP = 20
# Requests, prompt tokens, steps.
WORKLOADS = {"W1": (256, 512, 200), "W3": (1, 128, 400)}
GOALS = {"W1": 0.85, "W3": 0.92}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="llama8b", help="a bundled shape, or a directory with config.json")
    parser.add_argument("--rounds", type=int, default=3, help="how often base and adapters take turns")
    parser.add_argument("--rank", type=int, default=RANK, help="of every adapter")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    worker = build_worker(
        WorkerConfig(
            model=str(shape_directory(args.shape) or Path(args.shape)),
            socket=Path("unused"),
            device="cuda",
            load_format="dummy",
            max_model_len=2048,
            enable_lora=True,
            max_loras=NUM_ADAPTERS,
            max_lora_rank=args.rank,
        )
    )
    assert isinstance(worker.runner, CudaModelRunner)
    assert isinstance(worker.adapters, AdapterHost)
    while worker.runner.work_ahead():
        pass
    fill_slots(worker.runner, worker.adapters, args.rank)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "shape": args.shape, "rank": args.rank}
    for name, (num_requests, num_prompt_tokens, num_steps) in WORKLOADS.items():
        seconds: dict[str, list[float]] = {"base": [], "adapters": []}
        for _ in range(args.rounds):
            for kind, of_kind in seconds.items():
                slots = NUM_ADAPTERS if kind == "adapters" else 0
                of_kind.append(decode(worker, num_requests, num_prompt_tokens, num_steps, slots))
        speeds = {kind: num_requests / median(each) for kind, each in seconds.items()}
        share = speeds["adapters"] / speeds["base"]
        results[name] = {
            "base_tokens_per_s": round(speeds["base"], 1),
            "adapters_tokens_per_s": round(speeds["adapters"], 1),
            "share": round(share, 4),
            "goal": GOALS[name],
            "step_ms": {kind: [round(second * 1e3, 3) for second in each] for kind, each in seconds.items()},
        }
        print(f"{name}: base {speeds['base']:.1f}, adapters {speeds['adapters']:.1f} tokens/s: {share:.1%}")
    record.write(args.json, results)


@torch.inference_mode()
def fill_slots(runner: CudaModelRunner, host: AdapterHost, rank: int) -> None:
    """Random adapters of the rank in every slot, in every layer: numbers do not matter here, only their
    bytes."""
    for module in runner.model.modules():
        if isinstance(module, LinearLayer) and hasattr(module.adapters, "slots"):
            module.adapters.slots.a.normal_(0, 0.01)  # type: ignore[union-attr]
            module.adapters.slots.b.normal_(0, 0.01)  # type: ignore[union-attr]
    host.slots.table.ranks.fill_(-(-rank // 16) * 16)
    torch.cuda.synchronize()


def decode(worker: Any, num_requests: int, num_prompt_tokens: int, num_steps: int, num_slots: int) -> float:
    """Seconds of a decoding step, the median. The requests' prompts differ, so that none shares a prefix."""
    core = Scheduler(worker.facts.limits)
    for slot in range(num_slots):
        core.adapters.loaded(slot + 1)
        core.adapters.placed(slot + 1, slot)
    greedy = SamplingRecord(temperature=0.0)
    for index in range(num_requests):
        prompt = array("I", [(index * 31 + place * 7) % 30000 + 3 for place in range(num_prompt_tokens)])
        core.add(
            Request(
                str(index),
                prompt,
                len(prompt),
                greedy,
                num_prompt_tokens + num_steps + WARM_UP,
                adapter_id=index % num_slots + 1 if num_slots else 0,
            )
        )
    worker.runner.reset()
    ends: list[float] = []
    pending: deque[tuple[PendingStep, bool]] = deque()
    while (plan := core.schedule()) is not None or pending:
        if plan is not None:
            only_decodes = len(plan.rows) == num_requests and bool((plan.counts == 1).all())
            pending.append((worker.runner.launch(plan), only_decodes))
        if len(pending) == 2 or plan is None:
            launched, counts = pending.popleft()
            while not launched.done():
                time.sleep(20e-6)
            result = launched.result()
            assert not result.error, result.error
            core.update(result)
            if counts:
                ends.append(time.perf_counter())
    steps = [later - earlier for earlier, later in pairwise(ends)][WARM_UP:-5]
    return median(steps)


if __name__ == "__main__":
    main()
