"""The requests a worker knows, one row each, kept from step to step.

Token ids live on the device: a step reads its inputs there and appends what it sampled, so that the next
step can be launched before anyone has seen the token. Lengths and block tables live on the host, since every
step needs them to lay out its batch; they follow from the plans alone.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.backend import IntArray
from engine.dispatch.records import NewRequest, StepPlan
from engine.sampling.parameters import SamplingTable


class PlanError(ValueError):
    """A plan contradicts the worker's rows or limits. The step is not run."""


class RequestRows:
    """Rows of a worker, mutated by `apply` (from plans) and `append_sampled` (by the runner).

    Attributes:
        token_ids: [max_num_seqs, max_model_len] int64, on the device. Valid up to each row's length.
        num_tokens: each row's length, sampled tokens included, [max_num_seqs]; 0 where the row is free.
        num_blocks: entries of each row's block table.
        block_table: [max_num_seqs, blocks of max_model_len].
        sampling: parameters by row.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_pool_blocks: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.num_pool_blocks = num_pool_blocks
        self.vocab_size = vocab_size
        self.token_ids = torch.zeros((max_num_seqs, max_model_len), dtype=torch.int64, device=device)
        self.num_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_blocks: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        max_blocks = -(-max_model_len // block_size)
        self.block_table: IntArray = np.zeros((max_num_seqs, max_blocks), dtype=np.int64)
        self.sampling = SamplingTable(max_num_seqs)

    def reset(self) -> None:
        """Frees every row."""
        self.num_tokens[:] = 0
        self.num_blocks[:] = 0

    def apply(self, plan: StepPlan) -> None:
        """Frees rows, adds new requests and appends blocks, as the plan says.

        Raises:
            PlanError: the plan is inconsistent. Rows it frees are free even then.
        """
        self._free(plan.freed_rows.astype(np.int64))
        for request in plan.new_requests:
            self._add(request)
        self._append_blocks(plan)

    def append_sampled(self, rows: IntArray, sampled: torch.Tensor) -> None:
        """Appends one token, still on the device, to each of the rows."""
        flat = torch.from_numpy(rows * self.max_model_len + self.num_tokens[rows])
        self.token_ids.view(-1).index_copy_(0, flat.to(self.token_ids.device), sampled)
        self.num_tokens[rows] += 1

    def _free(self, rows: IntArray) -> None:
        _require(rows < self.max_num_seqs, rows, f"freed row must be below {self.max_num_seqs}")
        self.num_tokens[rows] = 0
        self.num_blocks[rows] = 0

    def _add(self, request: NewRequest) -> None:
        row, length, num_blocks = request.row, len(request.token_ids), len(request.block_ids)
        if row >= self.max_num_seqs:
            raise PlanError(f"new request's row {row} must be below {self.max_num_seqs}")
        if self.num_tokens[row]:
            raise PlanError(f"new request's row {row} is in use")
        if not 0 < length <= self.max_model_len:
            raise PlanError(f"new request has {length} tokens; 1 to {self.max_model_len} are allowed")
        if not 0 < request.num_prompt_tokens <= length:
            raise PlanError(f"new request has {length} tokens, {request.num_prompt_tokens} of them prompt")
        if num_blocks > self.block_table.shape[1]:
            raise PlanError(f"new request has {num_blocks} blocks; at most {self.block_table.shape[1]}")
        _require(
            request.token_ids < self.vocab_size,
            request.token_ids,
            f"token id must be below {self.vocab_size}",
        )
        self._require_in_pool(request.block_ids)
        token_ids = torch.from_numpy(request.token_ids.astype(np.int64))
        self.token_ids[row, :length].copy_(token_ids, non_blocking=True)
        self.block_table[row, :num_blocks] = request.block_ids
        self.num_tokens[row], self.num_blocks[row] = length, num_blocks
        self.sampling.set(row, request.sampling, request.num_prompt_tokens)

    def _append_blocks(self, plan: StepPlan) -> None:
        rows = plan.rows.astype(np.int64)
        added = plan.num_new_blocks.astype(np.int64)
        _require(rows < self.max_num_seqs, rows, f"scheduled row must be below {self.max_num_seqs}")
        if len(np.unique(rows)) != len(rows):
            raise PlanError("a row is scheduled twice in one step")
        if not added.any():
            return
        ends = self.num_blocks[rows] + added
        _require(
            ends <= self.block_table.shape[1], ends, f"blocks of a row: at most {self.block_table.shape[1]}"
        )
        self._require_in_pool(plan.new_block_ids)
        offsets = np.arange(int(added.sum())) - np.repeat(np.cumsum(added) - added, added)
        columns = np.repeat(self.num_blocks[rows], added) + offsets
        self.block_table[np.repeat(rows, added), columns] = plan.new_block_ids
        self.num_blocks[rows] = ends

    def _require_in_pool(self, block_ids: np.ndarray) -> None:
        _require(
            block_ids < self.num_pool_blocks, block_ids, f"block id must be below {self.num_pool_blocks}"
        )


def _require(holds: np.ndarray, values: np.ndarray, rule: str) -> None:
    if not holds.all():
        raise PlanError(f"{rule}, got {values[~holds][0]}")
