"""A worker in miniature: it executes plans on token ids alone and checks that each plan makes sense.

It stands in for a real worker where the scheduler's arithmetic is under test: its "KV cache" stores, for
every slot, the whole token history that a real KV entry would depend on, so reading a block that was never
written, was overwritten, or belongs to another context is caught at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from engine.dispatch.records import StepPlan, StepResult, TokenLogprobs, decode_plan, encode_plan, u32


def next_token(history: tuple[int, ...], vocab_size: int) -> int:
    """The "model": the next token is a hash of everything before it."""
    digest = hashlib.blake2b(repr(history).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % vocab_size


def continuation(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What the model generates after the prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tuple(tokens), vocab_size))
    return tokens[len(prompt) :]


def logprobs_of(token: int) -> TokenLogprobs:
    """Log probabilities that tell which token they belong to."""
    return TokenLogprobs(-float(token), [token], [-float(token)])


@dataclass
class _Row:
    token_ids: list[int]
    block_ids: list[int]
    with_logprobs: bool


@dataclass
class MiniatureWorker:
    """Executes plans in order, one at a time."""

    block_size: int
    vocab_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    rows: dict[int, _Row] = field(default_factory=dict)
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    last_step_id: int = -1

    def execute(self, plan: StepPlan, *, fail: bool = False) -> StepResult:
        """Runs a step. A failing one changes rows as a real one would, and ruins the KV it was to write."""
        plan = decode_plan(encode_plan(plan))
        assert plan.step_id == self.last_step_id + 1
        self.last_step_id = plan.step_id
        for row in plan.freed_rows.tolist():
            del self.rows[row]
        for new in plan.new_requests:
            assert new.row not in self.rows
            assert new.row < self.max_num_seqs
            with_logprobs = new.sampling.logprobs >= 0
            self.rows[new.row] = _Row(new.token_ids.tolist(), new.block_ids.tolist(), with_logprobs)
        self._append_blocks(plan)
        if fail:
            self._ruin(plan)
            return StepResult(plan.step_id, u32([]), error="the step failed")
        assert 0 < int(plan.counts.sum()) <= self.max_num_batched_tokens
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        self._store(plan)
        sampled, logprobs = [], {}
        for row, start, count, samples in self._scheduled(plan):
            self._attend(row, start + count)
            if samples:
                token = self._sample(row)
                if row.with_logprobs:
                    logprobs[len(sampled)] = logprobs_of(token)
                sampled.append(token)
        return StepResult(plan.step_id, u32(sampled), logprobs)

    def _scheduled(self, plan: StepPlan) -> list[tuple[_Row, int, int, int]]:
        columns = (plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), plan.samples.tolist())
        return [(self.rows[row], *rest) for row, *rest in zip(*columns, strict=True)]  # type: ignore[misc]

    def _append_blocks(self, plan: StepPlan) -> None:
        flat = iter(plan.new_block_ids.tolist())
        for row, count in zip(plan.rows.tolist(), plan.num_new_blocks.tolist(), strict=True):
            self.rows[row].block_ids += [next(flat) for _ in range(count)]
        assert next(flat, None) is None

    def _store(self, plan: StepPlan) -> None:
        for row, start, count, samples in self._scheduled(plan):
            assert count > 0
            assert samples == (start + count == len(row.token_ids))
            for position in range(start, start + count):
                self.slots[self._slot(row, position)] = tuple(row.token_ids[: position + 1])

    def _ruin(self, plan: StepPlan) -> None:
        for row, start, count, _ in self._scheduled(plan):
            for position in range(start, start + count):
                self.slots.pop(self._slot(row, position), None)

    def _attend(self, row: _Row, length: int) -> None:
        for position in range(length):
            expected = tuple(row.token_ids[: position + 1])
            assert self.slots.get(self._slot(row, position)) == expected, f"wrong KV at position {position}"

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.block_size], position % self.block_size

    def _sample(self, row: _Row) -> int:
        token = next_token(tuple(row.token_ids), self.vocab_size)
        row.token_ids.append(token)
        return token
