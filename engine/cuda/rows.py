"""The rows of a runner that lays out its batches on the device: tokens and block tables live there.

Plans change them by small diffs: every new token and block id becomes one (place, word) pair, and a step's
pairs travel with its columns.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.shared_prefix import SharedPrefix, find_shared_prefix
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan
from engine.step.row_ledger import RowLedger


class DeviceRows(RowLedger):
    """See RowLedger.

    Attributes:
        arena: int32; token ids of all rows, then their block tables.
        token_ids: [max_num_seqs, max_model_len], in the arena. Valid up to each row's length; the sampler
            appends to it.
        block_table: [max_num_seqs, max_blocks], in the arena.
        host_block_table: the same, on the host.
    """

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        super().__init__(limits)
        num_tokens = limits.max_num_seqs * limits.max_model_len
        num_blocks = limits.max_num_seqs * limits.max_blocks
        self.arena = torch.zeros(num_tokens + num_blocks, dtype=torch.int32, device=device)
        self.token_ids = self.arena[:num_tokens].view(limits.max_num_seqs, limits.max_model_len)
        self.block_table = self.arena[num_tokens:].view(limits.max_num_seqs, limits.max_blocks)
        self.host_block_table: IntArray = np.zeros(self.block_table.shape, dtype=np.int64)
        self._first_block_entry = num_tokens
        self._places: list[IntArray] = []
        self._words: list[np.ndarray] = []
        self._prefix: tuple[bytes, SharedPrefix | None] | None = None

    def reset(self) -> None:
        super().reset()
        self._prefix = None
        self.take_changes()

    def shared_prefix(self, rows: IntArray, starts: IntArray) -> SharedPrefix | None:
        """The prefix that decodes of these rows, at these positions, share. What was found holds until a
        request comes or goes: the blocks before a decode's own do not change."""
        key = rows.tobytes()
        if self._prefix is None or self._prefix[0] != key:
            block_size = self.limits.block_size
            found = find_shared_prefix(self.host_block_table, rows, starts // block_size, block_size)
            self._prefix = key, found
        return self._prefix[1]

    def apply(self, plan: StepPlan) -> None:
        if len(plan.freed_rows) or plan.new_requests:
            self._prefix = None
        super().apply(plan)

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """(places in the arena, words) that plans wrote since the last call, in order, both int32."""
        places, words = self._places, self._words
        self._places, self._words = [], []
        if not places:
            return _NOTHING, _NOTHING
        return np.concatenate(places).astype(np.int32), np.concatenate(words).astype(np.int32)

    def _write_tokens(self, row: int, token_ids: np.ndarray) -> None:
        begin = row * self.limits.max_model_len
        self._places.append(np.arange(begin, begin + len(token_ids)))
        self._words.append(token_ids)

    def _write_blocks(self, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        self.host_block_table[rows, columns] = block_ids
        self._places.append(self._first_block_entry + rows * self.limits.max_blocks + columns)
        self._words.append(block_ids)


_NOTHING = np.zeros(0, dtype=np.int32)
