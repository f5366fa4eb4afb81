"""The host's record of the requests in a runner's rows: lengths, blocks and sampling parameters.

All of it follows from the plans, so that a plan can be checked and laid out without reading from the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from engine.attention.interface import IntArray
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import Pooling
from engine.sampling.parameters import SamplingTable


class PlanError(ValueError):
    """A plan contradicts the worker's rows or limits. The step is not run."""


class RowLedger(ABC):
    """Rows of a worker, mutated by `apply` (from plans) and by whoever appends sampled tokens.

    Attributes:
        num_tokens: each row's length, including sampled tokens, [max_num_seqs]; 0 if the row is free.
        num_blocks: entries of each row's block table, in each KV group, [max_num_seqs].
        adapter_slots: the slot of each row's adapter, [max_num_seqs]; -1 is none.
        sampling: sampling parameters by row.
        watched: rows whose request asks for prompt logprobs or pooling, until its prompt is computed.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.num_tokens: IntArray = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self.num_blocks: IntArray = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self.adapter_slots: IntArray = np.full(limits.max_num_seqs, -1, dtype=np.int64)
        self.sampling = SamplingTable(limits.max_num_seqs)
        self.watched: set[int] = set()
        # For rows with pooling: the number of tokens in the pooled state.
        self._num_pooled: dict[int, int] = {}

    @abstractmethod
    def _write_tokens(self, row: int, token_ids: np.ndarray) -> None:
        """Writes a new request's tokens into its row."""

    @abstractmethod
    def _write_blocks(self, group: int, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        """Writes block ids into one KV group's block tables, each at its row and column."""

    @abstractmethod
    def _write_prediction(self, row: int, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        """Keeps a new request's prediction, which may be empty."""

    def reset(self) -> None:
        """Frees every row."""
        self.num_tokens[:] = 0
        self.num_blocks[:] = 0
        self.adapter_slots[:] = -1
        self.watched.clear()
        self._num_pooled.clear()

    def apply(self, plan: StepPlan) -> None:
        """Frees rows, adds new requests and appends blocks as the plan says, and checks its block copies.

        Raises:
            PlanError: the plan is inconsistent. The rows that it frees are free even then.
        """
        self._free(plan.freed_rows.astype(np.int64))
        for request in plan.new_requests:
            self._add(request)
        self._append_blocks(plan)
        if len(plan.copied_blocks):
            self._check_copies(plan.copied_blocks)

    @abstractmethod
    def _locate_decodes(self, rows: IntArray, starts: IntArray) -> IntArray:
        """Where decodes of these rows start, if the scheduler knows them to start at `starts` at least."""

    def check_schedule(self, plan: StepPlan) -> IntArray:
        """Checks the tokens that an applied plan computes.

        Returns:
            Where each request starts, as far as it is known here: with speculation requests may have gained
            more tokens than the scheduler knew of.

        Raises:
            PlanError: there are too many tokens, or tokens that a row does not have or has no block for, or a
                row that must or must not sample, or a mask or a number of drafts is wrong.
        """
        counts, starts = plan.counts.astype(np.int64), plan.starts.astype(np.int64)
        may_be_full = np.zeros(len(counts), dtype=bool)
        if self.limits.max_drafts:
            may_be_full = (counts == 1) & (plan.samples != 0)
            decoding = plan.rows[may_be_full].astype(np.int64)
            starts[may_be_full] = self._locate_decodes(decoding, starts[may_be_full])
        ends = starts + counts
        lengths = self.num_tokens[plan.rows]
        total = int(counts.sum()) + plan.num_draft_tokens
        most = self.limits.max_num_batched_tokens
        if total > most:
            raise PlanError(f"the step computes {total} tokens; at most {most} are allowed")
        _require_rows(plan, lengths > 0, "is not in use")
        _require_rows(plan, counts > 0, "computes no token")
        _require_rows(plan, ends <= lengths, "computes tokens beyond its end")
        samples = ends == lengths
        if self._num_pooled:
            self._check_pooling(plan, samples)
        _require_rows(plan, (plan.samples != 0) == samples, "must sample exactly at its last token")
        may_sample = (plan.samples == 0) | (lengths < self.limits.max_model_len)
        _require_rows(plan, may_sample | may_be_full, "is full and cannot sample")
        held = self.num_blocks[plan.rows] * self.limits.block_size
        _require_rows(plan, (ends <= held) | may_be_full, "has too few blocks")
        if plan.masks:
            self._check_masks(plan)
        if plan.drafts is not None:
            self._check_drafts(plan, plan.drafts, may_be_full)
        return starts

    def _check_drafts(self, plan: StepPlan, drafts: np.ndarray, decodes: np.ndarray) -> None:
        may_have = decodes.copy()
        may_have[list(plan.masks)] = False
        _require_rows(plan, (drafts == 0) | may_have, "has drafts, but does not decode without a mask")
        most, total = self.limits.max_draft_tokens, plan.num_draft_tokens
        _require_rows(plan, drafts <= self.limits.max_drafts, "has too many drafts")
        if total > most:
            raise PlanError(f"the step has {total} drafts; at most {most} are allowed")

    def room(self, rows: IntArray) -> IntArray:
        """How long each row can be before it computes another token: its blocks have room for so many, and
        one more can be sampled."""
        held = self.num_blocks[rows] * self.limits.block_size
        found: IntArray = np.minimum(held, self.limits.max_model_len - 1)
        return found

    def _check_pooling(self, plan: StepPlan, samples: np.ndarray) -> None:
        """Checks the rows with pooling, and clears their entries in `samples`."""
        pooled = np.isin(plan.rows, list(self._num_pooled))
        samples &= ~pooled
        in_order = np.ones(len(pooled), dtype=bool)
        for index in np.flatnonzero(pooled):
            row, start = int(plan.rows[index]), int(plan.starts[index])
            whole = self.sampling.parameters(row)["pooling"] in (Pooling.MEAN, Pooling.CLS)
            in_order[index] = not whole or start == self._num_pooled[row]
            self._num_pooled[row] = start + int(plan.counts[index])
        _require_rows(plan, in_order, "must compute all of its prompt, in order, for pooling")

    def _check_masks(self, plan: StepPlan) -> None:
        width = self.limits.mask_words
        last = np.uint32((1 << (self.limits.vocab_size - 1) % 32 + 1) - 1)
        for index, mask in plan.masks.items():
            if index >= len(plan.rows) or not plan.samples[index]:
                raise PlanError(f"a mask is for request {index} of the step, which does not sample")
            if len(mask) != width:
                raise PlanError(f"a mask has {len(mask)} words; it must have {width}")
            if not mask[:-1].any() and not mask[-1] & last:
                raise PlanError(f"the mask of row {plan.rows[index]} allows no token")

    def _free(self, rows: IntArray) -> None:
        _require(rows < self.limits.max_num_seqs, rows, f"freed row must be below {self.limits.max_num_seqs}")
        self.num_tokens[rows] = 0
        self.num_blocks[rows] = 0
        self.adapter_slots[rows] = -1
        if self.watched or self._num_pooled:
            self.watched.difference_update(rows.tolist())
            for row in rows.tolist():
                self._num_pooled.pop(row, None)

    def _add(self, request: NewRequest) -> None:
        row, length = request.row, len(request.token_ids)
        num_blocks = len(request.block_ids) // self.limits.num_kv_groups
        if row >= self.limits.max_num_seqs:
            raise PlanError(f"new request's row {row} must be below {self.limits.max_num_seqs}")
        if self.num_tokens[row]:
            raise PlanError(f"new request's row {row} is in use")
        if not 0 < length <= self.limits.max_model_len:
            raise PlanError(f"new request has {length} tokens; 1 to {self.limits.max_model_len} are allowed")
        if not 0 < request.num_prompt_tokens <= length:
            raise PlanError(f"new request has {length} tokens, {request.num_prompt_tokens} of them prompt")
        if num_blocks > self.limits.max_blocks:
            raise PlanError(f"new request has {num_blocks} blocks; at most {self.limits.max_blocks}")
        for token_ids in (request.token_ids, request.prediction):
            rule = f"token id must be below {self.limits.vocab_size}"
            _require(token_ids < self.limits.vocab_size, token_ids, rule)
        if len(request.prediction) > self.limits.max_prediction:
            raise PlanError(
                f"new request has a prediction of {len(request.prediction)} tokens; at most "
                f"{self.limits.max_prediction} are allowed"
            )
        if num_blocks * self.limits.num_kv_groups != len(request.block_ids):
            raise PlanError(f"new request has {len(request.block_ids)} blocks in {self._groups}")
        if request.adapter_slot > self.limits.max_loras:
            raise PlanError(
                f"new request has adapter slot {request.adapter_slot}; there are {self.limits.max_loras}"
            )
        self._require_in_pool(request.block_ids)
        self._write_tokens(row, request.token_ids)
        if self.limits.max_drafts:
            self._write_prediction(row, request.prediction, request.num_prompt_tokens)
        self._write_groups(np.full(num_blocks, row), np.arange(num_blocks), request.block_ids)
        self.adapter_slots[row] = request.adapter_slot - 1
        self.num_tokens[row], self.num_blocks[row] = length, num_blocks
        self.sampling.set(row, request.sampling, request.num_prompt_tokens)
        if request.sampling.pooling:
            self._num_pooled[row] = 0
        if request.sampling.pooling or request.sampling.prompt_logprobs >= 0:
            self.watched.add(row)

    def _append_blocks(self, plan: StepPlan) -> None:
        rows = plan.rows.astype(np.int64)
        added = plan.num_new_blocks.astype(np.int64)
        _require(
            rows < self.limits.max_num_seqs, rows, f"scheduled row must be below {self.limits.max_num_seqs}"
        )
        if np.bincount(rows, minlength=1).max(initial=0) > 1:
            raise PlanError("a row is scheduled twice in one step")
        if plan.num_kv_groups != self.limits.num_kv_groups:
            raise PlanError(f"the plan has {plan.num_kv_groups} KV groups; this worker has {self._groups}")
        if not added.any():
            return
        ends = self.num_blocks[rows] + added
        _require(ends <= self.limits.max_blocks, ends, f"blocks of a row: at most {self.limits.max_blocks}")
        self._require_in_pool(plan.new_block_ids)
        offsets = np.arange(int(added.sum())) - np.repeat(np.cumsum(added) - added, added)
        columns = np.repeat(self.num_blocks[rows], added) + offsets
        self._write_groups(np.repeat(rows, added), columns, plan.new_block_ids)
        self.num_blocks[rows] = ends

    @property
    def _groups(self) -> str:
        count = self.limits.num_kv_groups
        return "1 KV group" if count == 1 else f"{count} KV groups"

    def _write_groups(self, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        """Writes block ids, given group after group, into the block tables of all KV groups."""
        for group, own in enumerate(block_ids.reshape(self.limits.num_kv_groups, len(rows))):
            self._write_blocks(group, rows, columns, own)

    def _check_copies(self, copied_blocks: np.ndarray) -> None:
        self._require_in_pool(copied_blocks.reshape(-1))
        destinations = copied_blocks[:, 1]
        most = self.limits.max_num_seqs * self.limits.num_kv_groups
        if len(copied_blocks) > most:
            raise PlanError(f"{len(copied_blocks)} blocks are copied; at most {most}")
        if len(np.unique(destinations)) < len(destinations):
            raise PlanError("two blocks are copied to the same one")
        both = np.isin(destinations, copied_blocks[:, 0])
        _require(~both, destinations, "no block may be copied from and copied to in one step")

    def _require_in_pool(self, block_ids: np.ndarray) -> None:
        _require(
            block_ids < self.limits.num_blocks,
            block_ids,
            f"block id must be below {self.limits.num_blocks}",
        )


def _require(holds: np.ndarray, values: np.ndarray, rule: str) -> None:
    if not holds.all():
        raise PlanError(f"{rule}, got {values[~holds][0]}")


def _require_rows(plan: StepPlan, holds: np.ndarray, rule: str) -> None:
    if not holds.all():
        i = int(np.flatnonzero(~holds)[0])
        raise PlanError(
            f"row {plan.rows[i]} {rule}: start {plan.starts[i]}, count {plan.counts[i]}, "
            f"samples {plan.samples[i]}"
        )
