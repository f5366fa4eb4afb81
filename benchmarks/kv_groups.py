"""What one long request holds of the KV pool, with KV groups and without: the scheduler's core plans it.

Without groups every layer keeps every token. With them, layers with a sliding window give back what lies
behind it; a prompt's chunk still needs room for all of its tokens. No model is loaded: shapes are enough, and
tokens are made up. Bytes are those of keys and values in 16 bits.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from engine.models.kv_groups import KVGroups, kv_groups
from scheduler.core import Scheduler
from scheduler.request import Request

BLOCK_SIZE = 16
NUM_TOKENS = 32_768
NUM_DECODED = 256
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layers: every `period`-th sees everything (none if 0), the others `window` tokens."""

    num_layers: int
    period: int
    window: int
    num_kv_heads: int
    head_dim: int

    @property
    def windows(self) -> tuple[int, ...]:
        """Each layer's window, 0 for none."""
        return tuple(
            0 if self.period and layer % self.period == self.period - 1 else self.window
            for layer in range(self.num_layers)
        )

    def block_bytes(self, groups: KVGroups) -> int:
        """Of one block of one group."""
        return 2 * groups.group_size * BLOCK_SIZE * self.num_kv_heads * self.head_dim * 2


SHAPES = {
    "Gemma 3 270M": Shape(18, 6, 512, 1, 256),
    "Gemma 3 1B": Shape(26, 6, 512, 1, 256),
    "Gemma 3 4B": Shape(34, 6, 1024, 4, 256),
    "Gemma 3 12B": Shape(48, 6, 1024, 8, 256),
    "Gemma 3 27B": Shape(62, 6, 1024, 16, 128),
    "gpt-oss 20B": Shape(24, 2, 128, 8, 64),
    "Mistral 7B v0.1": Shape(32, 0, 4096, 8, 128),
}


def most_held(groups: KVGroups, chunk: int) -> dict[str, int]:
    """The most blocks that one request holds in any step of its prompt, and in any of its decodes."""
    limits = EngineLimits(
        vocab_size=100,
        max_model_len=NUM_TOKENS,
        block_size=BLOCK_SIZE,
        num_blocks=len(groups.windows) * NUM_TOKENS // BLOCK_SIZE,
        max_num_seqs=1,
        max_num_batched_tokens=chunk,
        kv_windows=groups.windows,
    )
    core = Scheduler(limits)
    num_prompt_tokens = NUM_TOKENS - NUM_DECODED
    prompt = array("I", [token % 97 for token in range(num_prompt_tokens)])
    core.add(Request("long", prompt, num_prompt_tokens, SamplingRecord(), NUM_TOKENS))
    held = {"prompt": 0, "decode": 0}
    in_flight: deque[StepPlan] = deque()
    while True:
        num_held_before = core.pool.num_used
        plan = core.schedule() if len(in_flight) < 2 else None
        if plan is not None:
            in_flight.append(plan)
            # While the step is planned, the request holds what it held, and what the step takes more.
            taken = len(plan.new_block_ids) + sum(len(new.block_ids) for new in plan.new_requests)
            phase = "prompt" if plan.counts[0] > 1 else "decode"
            held[phase] = max(held[phase], num_held_before + taken)
        elif in_flight:
            done = in_flight.popleft()
            core.update(StepResult(done.step_id, u32([1] * int(done.samples.sum()))))
        else:
            return held


def measure(shape: Shape, chunk: int) -> dict[str, Any]:
    """GiB held by one request, without groups and with them."""
    grouped = kv_groups(shape.windows, NUM_TOKENS)
    apart = kv_groups((0,) * shape.num_layers, NUM_TOKENS)
    before, after = most_held(apart, chunk), most_held(grouped, chunk)
    without, decoding, in_prompt = (
        count * shape.block_bytes(groups) / GIB
        for count, groups in (
            (before["decode"], apart),
            (after["decode"], grouped),
            (after["prompt"], grouped),
        )
    )
    return {
        "groups": f"{len(grouped.windows)} of {grouped.group_size} layers, "
        f"{len(grouped.windows) * grouped.group_size - shape.num_layers} places unused",
        "blocks_without": before["decode"],
        "blocks": after["decode"],
        "gib_without": round(without, 3),
        "gib": round(decoding, 3),
        "gib_in_prompt": round(in_prompt, 3),
        "share": round(decoding / without, 3),
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens of the prompt in a step")
    arguments = parser.parse_args()
    record.write(arguments.json, {name: measure(shape, arguments.chunk) for name, shape in SHAPES.items()})


if __name__ == "__main__":
    main()
