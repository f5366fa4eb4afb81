"""Finds cached blocks by their first tokens, for requests that diverge in the middle of a block.

A full block is found by its hash and shared. A block that is not full, or of which a request can use only the
first tokens, is found here and copied, so that its keys and values up to the point where the request differs
need not be computed again.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pagewire.wire.block_hashes import BlockHash

Place = tuple[BlockHash, str]
"""A block's position: the hash of the block before it, or a root, and the client. Blocks are not copied
between clients, because one could guess another's prompt token by token from the number of cached tokens.
"""
_MAX_CANDIDATES = 32
"""The most blocks remembered per place, the latest ones; a search compares them all. There is room for the
beams of a prompt and the beams they come from.
"""
_NO_TOKENS = array("I")


@dataclass(frozen=True, slots=True)
class PartialHit:
    """A block whose first tokens are a request's next tokens.

    Attributes:
        block_id: the block to copy.
        num_tokens: how many tokens match.
    """

    block_id: int
    num_tokens: int


class PartialBlocks:
    """The first tokens of blocks, by place.

    A step copies blocks before it computes, so what it computes can be copied by the next step at the
    earliest. Steps are counted here, and blocks put in during a step are not found in it.

    Every block that a prompt fills is put in, so the data is kept in columns, by block id: few objects are
    created and the garbage collector has little to visit.
    """

    def __init__(self, num_blocks: int) -> None:
        self._step = 0
        self._places: list[Place | None] = [None] * num_blocks
        self._tokens = [_NO_TOKENS] * num_blocks
        self._steps = [0] * num_blocks
        self._by_place: dict[Place, tuple[int, ...]] = {}

    def __contains__(self, block_id: int) -> bool:
        return self._places[block_id] is not None

    def begin_step(self) -> None:
        """Begins a step: blocks put in so far can be found from now on."""
        self._step += 1

    def put(self, block_id: int, place: Place, token_ids: array[int]) -> int | None:
        """Remembers a block.

        Args:
            block_id: a held block. If it was put in before, those tokens were a prefix of these.
            place: the block's place.
            token_ids: its first tokens, at least one, whose keys and values the steps planned so far compute.

        Returns:
            The block that was forgotten, if there were too many in this place; else None.
        """
        if self._places[block_id] is not None:
            self.drop(block_id)
        self._places[block_id], self._tokens[block_id] = place, token_ids
        self._steps[block_id] = self._step
        others = self._by_place.get(place)
        if others is None:
            self._by_place[place] = (block_id,)
            return None
        self._by_place[place] = (*others, block_id)
        if len(others) < _MAX_CANDIDATES:
            return None
        self.drop(others[0])
        return others[0]

    def drop(self, block_id: int) -> None:
        """Forgets a block."""
        place = self._places[block_id]
        if place is None:
            return
        self._forget(block_id)
        others = self._by_place[place]
        if len(others) == 1:
            del self._by_place[place]
        else:
            self._by_place[place] = tuple(each for each in others if each != block_id)

    def _forget(self, block_id: int) -> None:
        self._places[block_id] = None
        self._tokens[block_id] = _NO_TOKENS

    def clear(self) -> None:
        """Forgets all blocks."""
        for block_ids in self._by_place.values():
            for block_id in block_ids:
                self._forget(block_id)
        self._by_place.clear()

    def find(self, place: Place, token_ids: array[int]) -> PartialHit | None:
        """The block in this place that shares the longest prefix with `token_ids` (at least one token); None
        if none shares any.
        """
        best, longest, first = -1, 0, token_ids[0]
        for block_id in reversed(self._by_place.get(place, ())):
            known = self._tokens[block_id]
            if known[0] == first and self._steps[block_id] < self._step:
                length = _common_length(known, token_ids)
                if length > longest:
                    best, longest = block_id, length
        return PartialHit(best, longest) if longest else None

    def check(self) -> None:
        """Asserts the invariants. For tests."""
        found = {block_id: place for place, ids in self._by_place.items() for block_id in ids}
        assert found == {i: place for i, place in enumerate(self._places) if place is not None}
        assert sum(map(len, self._by_place.values())) == len(found)
        assert all(0 < len(block_ids) <= _MAX_CANDIDATES for block_ids in self._by_place.values())
        assert all(bool(self._tokens[i]) == (i in found) for i in range(len(self._tokens)))


def _common_length(a: array[int], b: array[int]) -> int:
    length = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        length += 1
    return length
