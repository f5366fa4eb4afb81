"""Which blocks begin with which tokens, for requests that go on differently in the middle of one.

A block that is full is found by its hash, and shared. One that is not, or of which a request wants only the
first tokens, is found here and copied: its keys and values up to where the request differs need not be
computed again.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from scheduler.blocks.hashes import BlockHash

Place = tuple[BlockHash, str]
"""Where a block is: the hash of the block before it, or a root; and whose it is. What one client sent is not
copied for another, who could find it out token by token from how much of a guess was there already.
"""
_MAX_CANDIDATES = 32
"""Blocks remembered of those that follow the same one, the latest: what a search looks at. There is room for
the beams of a prompt and those that they come from.
"""
_NO_TOKENS = array("I")


@dataclass(frozen=True, slots=True)
class PartialHit:
    """A block whose first tokens are a request's next ones.

    Attributes:
        block_id: to be copied.
        num_tokens: how many they are.
    """

    block_id: int
    num_tokens: int


class PartialBlocks:
    """The first tokens of blocks, by their place.

    A step copies before it computes. So what a step computes can be copied by the next one at the earliest:
    steps are counted here, and what was put in since the last one began is not found in it.

    Every block that a prompt fills is put in, so what is kept of it is in columns, by its id: little is made
    for it, and hardly anything for the garbage collector to visit.
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
        """What was put in so far may be found from now on."""
        self._step += 1

    def put(self, block_id: int, place: Place, token_ids: array[int]) -> int | None:
        """Remembers a block.

        Args:
            block_id: held; what was known of it is a beginning of this.
            place: its own.
            token_ids: those, one at least, whose keys and values the steps planned so far compute into it,
                from its first on.

        Returns:
            The block that is forgotten for it, if there were too many in its place.
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
        """Forgets all."""
        for block_ids in self._by_place.values():
            for block_id in block_ids:
                self._forget(block_id)
        self._by_place.clear()

    def find(self, place: Place, token_ids: array[int]) -> PartialHit | None:
        """The block in this place that begins with the most of these tokens, of which there is one at least;
        None if none begins with any.
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
        """Asserts its invariants. For tests."""
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
