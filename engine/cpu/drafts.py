"""Draft tokens of a step on the CPU: proposed from the rows on the host, verified in slots of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray
from engine.cpu.rows import RequestRows
from engine.dispatch.records import StepPlan
from engine.sampling.generator import uniforms
from engine.speculation import ngram
from engine.speculation.accept import count_gained
from engine.speculation.settings import SpeculationSettings

_NOTHING: IntArray = np.zeros(0, np.int64)
# Of the numbers by which the test proposer accepts.
_TEST_SEED = 0x5EED


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """What a step verifies.

    Attributes:
        num_slots: of each request of the plan: one, and one more for each draft; none for a request that
            steps before this one have taken to its end.
        proposed: of each request of the plan, its draft tokens.
    """

    num_slots: IntArray
    proposed: list[IntArray]

    def by_slot(self, samples: np.ndarray) -> IntArray:
        """For each slot of the requests that sample the draft that comes after it, -1 where none does."""
        parts: list[IntArray] = []
        for drafts, slots in zip(self.proposed, self.num_slots.tolist(), strict=True):
            parts += [drafts, _LAST] if slots else []
        chosen = np.repeat(samples, self.num_slots)
        every = np.concatenate(parts) if parts else _NOTHING
        found: IntArray = every[chosen]
        return found


_LAST: IntArray = np.full(1, -1, np.int64)


class CpuDrafter:
    """Proposes drafts, and says which were accepted."""

    def __init__(self, settings: SpeculationSettings, rows: RequestRows) -> None:
        self._settings, self._rows = settings, rows

    def propose(self, plan: StepPlan, starts: IntArray) -> DraftTokens | None:
        """Proposes drafts for a checked plan and puts them behind the ends of their rows. None if there are
        none, and every request computes what the plan says."""
        rows = plan.rows.astype(np.int64)
        decodes = (plan.counts == 1) & (plan.samples != 0)
        room = self._rows.room(rows) - starts - 1
        is_full = decodes & (room < 0)
        if plan.drafts is None and not is_full.any():
            return None
        wanted = np.zeros(len(rows), np.int64) if plan.drafts is None else plan.drafts.astype(np.int64)
        wanted = np.minimum(wanted, np.maximum(room, 0))
        proposed = [_NOTHING] * len(rows)
        for column in np.flatnonzero(wanted).tolist():
            proposed[column] = self._propose(int(rows[column]), int(starts[column]) + 1, int(wanted[column]))
        counts = np.array([len(each) for each in proposed], np.int64)
        if counts.any():
            owners = np.repeat(rows, counts)
            offsets = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
            positions = np.repeat(starts + 1, counts) + offsets
            self._rows.write_drafts(owners, positions, np.concatenate(proposed))
        return DraftTokens(np.where(is_full, 0, 1 + counts), proposed)

    def _propose(self, row: int, length: int, count: int) -> IntArray:
        settings = self._settings
        tokens: IntArray = self._rows.token_ids[row, :length].numpy()
        if settings.method == "test":
            return np.repeat(tokens[-1:], count)
        parameters = self._rows.sampling.parameters(row)
        return ngram.propose(
            tokens,
            self._rows.predictions.get(row, _NOTHING),
            length - int(parameters["num_prompt_tokens"]),
            least=settings.prompt_lookup_min,
            most=settings.prompt_lookup_max,
            count=count,
        )

    def count_gained(
        self, drafts: IntArray, sampled: IntArray, num_slots: IntArray, rows: IntArray, positions: IntArray
    ) -> IntArray:
        """Tokens that each request gains; see `engine.speculation.accept`.

        Args:
            rows, positions: of each slot's sampled token.
        """
        if self._settings.method == "test":
            draws = uniforms(rows + _TEST_SEED, positions)
            drafts = np.where((drafts >= 0) & (draws < self._settings.acceptance), sampled, -1)
        return count_gained(drafts, sampled, num_slots)
