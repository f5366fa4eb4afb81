"""A worker in miniature: it executes plans on token ids alone and checks that each plan makes sense.

It stands in for a real worker where the scheduler's arithmetic is under test: its "KV cache" stores, for
every slot, the KV group and the whole token history that a real KV entry would depend on, so reading a block
that was never written, was overwritten, or belongs to another context or group is caught at once. Of a group
with a window it reads what the step's first token sees, and no more: what lies behind may be anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.dispatch.records import (
    PromptLogprobs,
    StepPlan,
    StepResult,
    TokenLogprobs,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from engine.dispatch.sampling import F32Array, Pooling, SamplingRecord, U32Array, u32


def next_token(history: tuple[int, ...], vocab_size: int, allowed: frozenset[int] | None = None) -> int:
    """The "model": the next token is a hash of everything before it, or the first allowed one after that."""
    digest = hashlib.blake2b(repr(history).encode(), digest_size=4).digest()
    token = int.from_bytes(digest, "little") % vocab_size
    while allowed is not None and token not in allowed:
        token = (token + 1) % vocab_size
    return token


def continuation(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What the model generates after the prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tuple(tokens), vocab_size))
    return tokens[len(prompt) :]


def logprobs_of(token: int) -> TokenLogprobs:
    """Log probabilities that tell which token they belong to."""
    return TokenLogprobs(-float(token), [token], [-float(token)])


def prompt_logprob(history: list[int], index: int) -> float:
    """The log probability of a prompt token, which tells it and its place from others."""
    return -float(history[index]) - index / 64


def hidden_state(history: list[int], position: int) -> float:
    """A hidden state of one number, which depends on all tokens up to its own."""
    return float(next_token(tuple(history[: position + 1]), 997))


def pooled_state(prompt: list[int], pooling: int) -> float:
    """What pooling makes of a prompt's hidden states."""
    states = [hidden_state(prompt, position) for position in range(len(prompt))]
    return {Pooling.LAST: states[-1], Pooling.MEAN: sum(states) / len(states), Pooling.CLS: states[0]}[
        Pooling(pooling)
    ]


def to_mask(allowed: frozenset[int], vocab_size: int) -> U32Array:
    """As plans carry it."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[sorted(allowed)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def from_mask(mask: U32Array) -> frozenset[int]:
    """The tokens that a mask allows."""
    return frozenset(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@dataclass
class _Row:
    token_ids: list[int]
    block_tables: list[list[int]]
    num_prompt_tokens: int
    sampling: SamplingRecord
    states: list[float] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return len(self.block_tables[0])


@dataclass
class MiniatureWorker:
    """Executes plans in order, one at a time. With `generosity`, which says how many tokens are gained by all
    drafts at most, a request that computes the last token of its row goes on from where the row ends here,
    however far the scheduler knows it to be.
    """

    block_size: int
    vocab_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    kv_windows: tuple[int, ...] = (0,)
    rows: dict[int, _Row] = field(default_factory=dict)
    slots: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    last_step_id: int = -1
    generosity: Callable[[], int] | None = None

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
            block_tables = new.block_ids.reshape(len(self.kv_windows), -1).tolist()
            self.rows[new.row] = _Row(
                new.token_ids.tolist(), block_tables, new.num_prompt_tokens, new.sampling
            )
        self._append_blocks(plan)
        self._copy_blocks(plan)
        if fail:
            self._ruin(plan)
            return StepResult(plan.step_id, u32([]), error="the step failed")
        assert 0 < int(plan.counts.sum()) <= self.max_num_batched_tokens
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        self._store(plan)
        result = StepResult(plan.step_id, u32([]))
        sampled, gained = [], []
        drafts = [0] * len(plan.rows) if plan.drafts is None else plan.drafts.tolist()
        assert int(plan.counts.sum()) + sum(drafts) <= self.max_num_batched_tokens
        for column, (row, start, count, samples) in enumerate(self._scheduled(plan)):
            if start // self.block_size >= row.num_blocks:
                assert samples
                gained.append(0)
                continue
            self._attend(row, start, count)
            if row.sampling.prompt_logprobs >= 0:
                result.prompt_logprobs += _prompt_logprobs(column, row, start, count)
            if row.sampling.pooling:
                result.pooled.update(_pool(column, row, start, count))
            assert samples or column not in plan.masks
            if samples:
                mask = plan.masks.get(column)
                token = self._sample(row, None if mask is None else from_mask(mask))
                assert not drafts[column] or (count == 1 and column not in plan.masks)
                tokens = [token, *self._more(row, drafts[column])]
                for index, each in enumerate(tokens, len(sampled)):
                    if row.sampling.logprobs >= 0:
                        result.logprobs[index] = logprobs_of(each)
                sampled += tokens
                gained.append(len(tokens))
        result.token_ids = u32(sampled)
        if plan.drafts is not None or 0 in gained:
            result.num_tokens = u32(gained)
            result.num_drafts = plan.drafts[plan.samples > 0] if plan.drafts is not None else None
        return decode_result(encode_result(result))

    def _more(self, row: _Row, num_drafts: int) -> list[int]:
        """Tokens that a request gains by its drafts."""
        if self.generosity is None or not num_drafts:
            return []
        tokens = []
        for _ in range(min(self.generosity() - 1, num_drafts)):
            position = len(row.token_ids) - 1
            if (position + 1) // self.block_size >= row.num_blocks:
                break  # as far as the scheduler expects the request to go
            self._write(row, position)
            tokens.append(self._sample(row, None))
        return tokens

    def _scheduled(self, plan: StepPlan) -> list[tuple[_Row, int, int, int]]:
        columns = (plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), plan.samples.tolist())
        steps = []
        for number, start, count, samples in zip(*columns, strict=True):
            row = self.rows[number]
            if self.generosity is not None and samples and count == 1:
                start = len(row.token_ids) - 1
            steps.append((row, start, count, samples))
        return steps

    def _append_blocks(self, plan: StepPlan) -> None:
        assert plan.num_kv_groups == len(self.kv_windows)
        flat = iter(plan.new_block_ids.tolist())
        for group in range(plan.num_kv_groups):
            for row, count in zip(plan.rows.tolist(), plan.num_new_blocks.tolist(), strict=True):
                self.rows[row].block_tables[group] += [next(flat) for _ in range(count)]
        assert next(flat, None) is None

    def _copy_blocks(self, plan: StepPlan) -> None:
        sources, destinations = (set(ids) for ids in plan.copied_blocks.T.tolist())
        assert len(destinations) == len(plan.copied_blocks)
        assert not sources & destinations
        for source, destination in plan.copied_blocks.tolist():
            for offset in range(self.block_size):
                self.slots.pop((destination, offset), None)
                if (source, offset) in self.slots:
                    self.slots[destination, offset] = self.slots[source, offset]

    def _store(self, plan: StepPlan) -> None:
        for row, start, count, samples in self._scheduled(plan):
            assert count > 0
            whole = start + count == len(row.token_ids)
            assert samples == (whole and not row.sampling.pooling)
            if self.generosity is not None and start // self.block_size >= row.num_blocks:
                continue  # steps before this one have taken it to its end
            for position in range(start, start + count):
                self._write(row, position)

    def _ruin(self, plan: StepPlan) -> None:
        for row, start, count, _ in self._scheduled(plan):
            for position in range(start, start + count):
                for block_id in self._blocks_at(row, position):
                    self.slots.pop((block_id, position % self.block_size), None)

    def _attend(self, row: _Row, start: int, count: int) -> None:
        for group, window in enumerate(self.kv_windows):
            oldest = max(0, start - window + 1) if window else 0
            for position in range(oldest, start + count):
                slot = self._blocks_at(row, position)[group], position % self.block_size
                expected = group, tuple(row.token_ids[: position + 1])
                assert self.slots.get(slot) == expected, f"wrong KV at position {position} in group {group}"

    def _write(self, row: _Row, position: int) -> None:
        """The KV of a token in all groups, which depends on all tokens before it."""
        for group, block_id in enumerate(self._blocks_at(row, position)):
            kv = group, tuple(row.token_ids[: position + 1])
            self.slots[block_id, position % self.block_size] = kv

    def _blocks_at(self, row: _Row, position: int) -> list[int]:
        """The block of each group that has this position."""
        return [table[position // self.block_size] for table in row.block_tables]

    def _sample(self, row: _Row, allowed: frozenset[int] | None) -> int:
        token = next_token(tuple(row.token_ids), self.vocab_size, allowed)
        row.token_ids.append(token)
        return token


def _prompt_logprobs(column: int, row: _Row, start: int, count: int) -> list[PromptLogprobs]:
    """For the prompt tokens after those computed."""
    told = range(start + 1, min(start + count, row.num_prompt_tokens - 1) + 1)
    if not told:
        return []
    logprobs = np.array([prompt_logprob(row.token_ids, index) for index in told], np.float32)
    top = row.sampling.prompt_logprobs
    top_ids = np.array([row.token_ids[index : index + 1] * top for index in told], np.uint32)
    return [PromptLogprobs(column, told[0], logprobs, top_ids, np.repeat(logprobs[:, None], top, axis=1))]


def _pool(column: int, row: _Row, start: int, count: int) -> dict[int, F32Array]:
    """The state, if these are the last of the prompt's tokens. All but the last's need every position."""
    whole = row.sampling.pooling != Pooling.LAST
    assert not whole or start == len(row.states), "a position was left out"
    row.states += [hidden_state(row.token_ids, position) for position in range(start, start + count)]
    if start + count < row.num_prompt_tokens:
        return {}
    return {column: np.array([pooled_state(row.token_ids, row.sampling.pooling)], np.float32)}
