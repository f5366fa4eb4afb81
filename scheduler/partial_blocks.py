"""Which blocks begin with which tokens, for requests that go on differently in the middle of one.

A block that is full is found by its hash, and shared. One that is not, or of which a request wants only the
first tokens, is found here and copied: its keys and values up to where the request differs need not be
computed again.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from scheduler.block_hash import BlockHash

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
    """The first tokens of blocks, by what comes before them.

    A step copies before it computes. So what a step computes can be copied by the next one at the earliest:
    steps are counted here, and what was put in since the last one began is not found in it.

    Every block that a prompt fills is put in, so what is kept of it is in columns, by its id: no object is
    made for it, nor for the garbage collector to visit.
    """

    def __init__(self, num_blocks: int) -> None:
        self._step = 0
        self._parents: list[BlockHash | None] = [None] * num_blocks
        self._tokens = [_NO_TOKENS] * num_blocks
        self._starts, self._ends, self._steps = ([0] * num_blocks for _ in range(3))
        self._by_parent: dict[BlockHash, tuple[int, ...]] = {}

    def __contains__(self, block_id: int) -> bool:
        return self._parents[block_id] is not None

    def begin_step(self) -> None:
        """What was put in so far may be found from now on."""
        self._step += 1

    def put(self, block_id: int, parent: BlockHash, token_ids: array[int], start: int, end: int) -> None:
        """Remembers a block.

        Args:
            block_id: held; what was known of it is a beginning of this.
            parent: hash of the block before it, or a root.
            token_ids: a request's, to which others may be appended but which stay as they are.
            start, end: those of them, one at least, whose keys and values the steps planned so far compute
                into the block, from its first on.
        """
        if self._parents[block_id] is not None:
            self.drop(block_id)
        self._parents[block_id] = parent
        self._tokens[block_id], self._starts[block_id], self._ends[block_id] = token_ids, start, end
        self._steps[block_id] = self._step
        others = self._by_parent.get(parent)
        if others is None:
            self._by_parent[parent] = (block_id,)
            return
        if len(others) == _MAX_CANDIDATES:
            self._forget(others[0])
            others = others[1:]
        self._by_parent[parent] = (*others, block_id)

    def drop(self, block_id: int) -> None:
        """Forgets a block, because it will be written anew."""
        parent = self._parents[block_id]
        if parent is None:
            return
        self._forget(block_id)
        others = self._by_parent[parent]
        if len(others) == 1:
            del self._by_parent[parent]
        else:
            self._by_parent[parent] = tuple(each for each in others if each != block_id)

    def _forget(self, block_id: int) -> None:
        self._parents[block_id] = None
        self._tokens[block_id] = _NO_TOKENS

    def clear(self) -> None:
        """Forgets all."""
        for block_ids in self._by_parent.values():
            for block_id in block_ids:
                self._forget(block_id)
        self._by_parent.clear()

    def find(self, parent: BlockHash, token_ids: array[int]) -> PartialHit | None:
        """The block after `parent` that begins with the most of these tokens, of which there is one at least;
        None if none begins with any.
        """
        best, longest, first = -1, 0, token_ids[0]
        for block_id in reversed(self._by_parent.get(parent, ())):
            known, start = self._tokens[block_id], self._starts[block_id]
            if known[start] == first and self._steps[block_id] < self._step:
                length = _common_length(known[start : self._ends[block_id]], token_ids)
                if length > longest:
                    best, longest = block_id, length
        return PartialHit(best, longest) if longest else None

    def check(self) -> None:
        """Asserts its invariants. For tests."""
        found = {block_id: parent for parent, ids in self._by_parent.items() for block_id in ids}
        assert found == {i: parent for i, parent in enumerate(self._parents) if parent is not None}
        assert sum(map(len, self._by_parent.values())) == len(found)
        assert all(0 < len(block_ids) <= _MAX_CANDIDATES for block_ids in self._by_parent.values())
        assert all((self._tokens[i] is _NO_TOKENS) == (i not in found) for i in range(len(self._tokens)))


def _common_length(a: array[int], b: array[int]) -> int:
    length = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        length += 1
    return length
