"""The rows of a runner that keeps tokens and block tables in device memory.

Plans change them by small diffs: every new token and block id becomes one (place, word) pair, and the pairs
are sent to the device together with the step's columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.shared_prefix import SharedPrefix, find_shared_prefix
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan
from engine.step.row_ledger import PlanError, RowLedger


class DeviceRows(RowLedger):
    """See RowLedger.

    Attributes:
        arena: int32, on the device; token ids of all rows, then their block tables, group by group, then
            their lengths.
        token_ids: [max_num_seqs, max_model_len], in the arena. Valid up to each row's length; the sampler
            appends to it.
        block_tables: [num_kv_groups, max_num_seqs, max_blocks], in the arena.
        host_block_tables: a copy of `block_tables` on the host.
        lengths: tokens of each row, [max_num_seqs], in the arena; a step adds the tokens that it appends.
        prompt_lengths: with speculation, how many of each row's tokens are prompt, [max_num_seqs], in the
            arena.
        device_predictions, prediction_lengths: with speculation, each row's prediction, [max_num_seqs,
            max_prediction] and [max_num_seqs], in the arena.
        can_share_prefix: whether any KV group keeps all blocks of its requests.
    """

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        super().__init__(limits)
        num_tokens = limits.max_num_seqs * limits.max_model_len
        tables = (limits.num_kv_groups, limits.max_num_seqs, limits.max_blocks)
        num_entries = math.prod(tables)
        self._first_block_entry, self._first_length = num_tokens, num_tokens + num_entries
        num_rows = limits.max_num_seqs
        self._first_prediction = self._first_length + num_rows
        num_predicted = num_rows * limits.max_prediction
        size = self._first_prediction + (num_predicted + 2 * num_rows if limits.max_drafts else 0)
        self.arena = torch.zeros(size, dtype=torch.int32, device=device)
        self.token_ids = self.arena[:num_tokens].view(limits.max_num_seqs, limits.max_model_len)
        self.block_tables = self.arena[num_tokens : self._first_length].view(tables)
        self.lengths = self.arena[self._first_length : self._first_prediction]
        of_predictions = self.arena[self._first_prediction :]
        self.device_predictions = of_predictions[:num_predicted].view(num_rows, limits.max_prediction)
        self.prediction_lengths, self.prompt_lengths = of_predictions[num_predicted:].view(2, -1)
        self.host_block_tables: IntArray = np.zeros(tables, dtype=np.int64)
        self._places: list[IntArray] = []
        self._words: list[np.ndarray] = []
        self._prefix: tuple[bytes, SharedPrefix | None] | None = None
        self.can_share_prefix = 0 in limits.kv_windows

    def reset(self) -> None:
        super().reset()
        self._prefix = None
        self.take_changes()

    def shared_prefix(self, rows: IntArray, starts: IntArray) -> SharedPrefix | None:
        """The prefix that decodes of these rows, at these positions, share; None if none is worth it. The
        result is cached until a request is added or removed, because the blocks before a decode's own do
        not change.

        It is found in the first KV group without a window. Who shares its blocks there has the same tokens,
        so in the other such groups any of their block tables serves all of them.
        """
        if not self.can_share_prefix:
            return None
        key = rows.tobytes()
        if self._prefix is None or self._prefix[0] != key:
            block_size = self.limits.block_size
            table = self.host_block_tables[self.limits.kv_windows.index(0)]
            found = find_shared_prefix(table, rows, starts // block_size, block_size)
            self._prefix = key, found
        return self._prefix[1]

    def apply(self, plan: StepPlan) -> None:
        if len(plan.freed_rows) or plan.new_requests:
            self._prefix = None
        super().apply(plan)

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """(indices into the arena, words) that plans wrote since the last call, in order, both int32."""
        places, words = self._places, self._words
        self._places, self._words = [], []
        if not places:
            return _NOTHING, _NOTHING
        return np.concatenate(places).astype(np.int32), np.concatenate(words).astype(np.int32)

    def _locate_decodes(self, rows: IntArray, starts: IntArray) -> IntArray:
        """The device alone knows; what the scheduler knows is the least that it may be."""
        known = self.num_tokens[rows] - 1
        if (starts < known).any():
            raise PlanError(f"row {rows[starts < known][0]} computes tokens before its end")
        self.num_tokens[rows] = starts + 1
        return starts

    def put_tokens(self, rows: IntArray, places: IntArray, tokens: IntArray) -> None:
        """Puts a token into each of these rows, which have room for it there already."""
        self._places.append(rows * self.limits.max_model_len + places)
        self._words.append(tokens)

    def _write_tokens(self, row: int, token_ids: np.ndarray) -> None:
        begin = row * self.limits.max_model_len
        self._places += [np.arange(begin, begin + len(token_ids)), np.array([self._first_length + row])]
        self._words += [token_ids, np.array([len(token_ids)])]

    def _write_prediction(self, row: int, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        limits, count = self.limits, len(token_ids)
        begin = self._first_prediction + row * limits.max_prediction
        lengths = self._first_prediction + limits.max_num_seqs * limits.max_prediction + row
        self._places += [np.arange(begin, begin + count), np.array([lengths, lengths + limits.max_num_seqs])]
        self._words += [token_ids, np.array([count, num_prompt_tokens])]

    def _write_blocks(self, group: int, rows: IntArray, columns: IntArray, block_ids: np.ndarray) -> None:
        limits = self.limits
        self.host_block_tables[group, rows, columns] = block_ids
        entry = (group * limits.max_num_seqs + rows) * limits.max_blocks + columns
        self._places.append(self._first_block_entry + entry)
        self._words.append(block_ids)


_NOTHING = np.zeros(0, dtype=np.int32)
