"""The rows of a runner that lays out its batches on the host.

Token ids live on the device: a step reads its inputs there and appends what it sampled, so that the next
step can be launched before anyone has seen the token. Block tables live on the host, since every step needs
them to lay out its batch.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.dispatch.limits import EngineLimits
from engine.step.row_ledger import PlanError, RowLedger


class RequestRows(RowLedger):
    """See RowLedger.

    Attributes:
        token_ids: [max_num_seqs, max_model_len] int64, on the device. Valid up to each row's length.
        block_tables: [num_kv_groups, max_num_seqs, max_blocks].
        predictions: row -> the prediction of its request, for those that had one last.
    """

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        super().__init__(limits)
        size = (limits.max_num_seqs, limits.max_model_len)
        self.token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        tables = (limits.num_kv_groups, limits.max_num_seqs, limits.max_blocks)
        self.predictions: dict[int, IntArray] = {}
        self.block_tables: IntArray = np.zeros(tables, dtype=np.int64)

    def _locate_decodes(self, rows: IntArray, starts: IntArray) -> IntArray:
        known = self.num_tokens[rows] - 1
        if (starts > known).any():
            raise PlanError(f"row {rows[starts > known][0]} computes tokens beyond its end")
        return known

    def write_drafts(self, rows: IntArray, positions: IntArray, drafts: IntArray) -> None:
        """Puts draft tokens behind the ends of rows, where they stay if they are accepted."""
        flat = torch.from_numpy(rows * self.limits.max_model_len + positions)
        self.token_ids.view(-1).index_copy_(0, flat, torch.from_numpy(drafts))

    def append_sampled(self, rows: IntArray, sampled: torch.Tensor) -> None:
        """Appends one token, still on the device, to each of the rows."""
        flat = torch.from_numpy(rows * self.limits.max_model_len + self.num_tokens[rows])
        self.token_ids.view(-1).index_copy_(0, flat.to(self.token_ids.device), sampled)
        self.num_tokens[rows] += 1

    def put_tokens(self, rows: IntArray, places: IntArray, tokens: IntArray) -> None:
        """Puts a token into each of these rows, which have room for it there already."""
        self.token_ids[torch.from_numpy(rows), torch.from_numpy(places)] = torch.from_numpy(tokens)

    def _write_tokens(self, row: int, token_ids: np.ndarray) -> None:
        tokens = torch.from_numpy(token_ids.astype(np.int64))
        self.token_ids[row, : len(tokens)].copy_(tokens, non_blocking=True)

    def _write_prediction(self, row: int, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        self.predictions.pop(row, None)
        if len(token_ids):
            self.predictions[row] = token_ids.astype(np.int64)

    def _write_blocks(self, group: int, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        self.block_tables[group, rows, columns] = block_ids
