"""The tokens of a step that verified drafts: of the tokens sampled in all slots, those that requests gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.attention.interface import IntArray
from engine.dispatch.records import StepResult
from engine.dispatch.sampling import u32


@dataclass(frozen=True, slots=True)
class AcceptedSlots:
    """Of a step's slots, request after request.

    Attributes:
        num_slots: slots of each request that samples, in the plan's order.
        num_tokens: tokens that it gains: those of its first slots.
        num_drafts: draft tokens that were proposed for it.
    """

    num_slots: IntArray
    num_tokens: IntArray
    num_drafts: IntArray

    @property
    def kept(self) -> np.ndarray:
        """Whether the token of each slot is gained, [slots]."""
        begins = np.cumsum(self.num_slots) - self.num_slots
        offsets = np.arange(int(self.num_slots.sum())) - np.repeat(begins, self.num_slots)
        kept: np.ndarray = offsets < np.repeat(self.num_tokens, self.num_slots)
        return kept

    @property
    def is_one_each(self) -> bool:
        """Whether no request could have drafts, and each gains its one token."""
        return bool((self.num_slots == 1).all() and (self.num_tokens == 1).all())

    def narrow(self, result: StepResult) -> None:
        """Leaves, of a result with the tokens of all slots, what requests gain."""
        kept = self.kept
        place = np.cumsum(kept) - 1
        result.token_ids = result.token_ids[kept]
        result.logprobs = {
            int(place[index]): entry for index, entry in result.logprobs.items() if kept[index]
        }
        result.num_tokens = u32(self.num_tokens.tolist())
        result.num_drafts = u32(self.num_drafts.tolist())
