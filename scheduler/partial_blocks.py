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


@dataclass(frozen=True, slots=True)
class PartialHit:
    """A block whose first tokens are a request's next ones.

    Attributes:
        block_id: to be copied.
        num_tokens: how many they are.
    """

    block_id: int
    num_tokens: int


@dataclass(slots=True)
class _Entry:
    block_id: int
    parent: BlockHash
    token_ids: array[int]
    step: int


class PartialBlocks:
    """The first tokens of blocks, by what comes before them.

    A step copies before it computes. So what a step computes can be copied by the next one at the earliest:
    steps are counted here, and what was put in since the last one began is not found in it.
    """

    def __init__(self) -> None:
        self._step = 0
        self._by_block: dict[int, _Entry] = {}
        self._by_parent: dict[BlockHash, list[_Entry]] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_block

    def begin_step(self) -> None:
        """What was put in so far may be found from now on."""
        self._step += 1

    def put(self, block_id: int, parent: BlockHash, token_ids: array[int]) -> None:
        """Remembers a block.

        Args:
            block_id: held; what was known of it is a beginning of this.
            parent: hash of the block before it, or a root.
            token_ids: those whose keys and values the steps planned so far compute into it, from its first
                on; not empty.
        """
        self.drop(block_id)
        entry = self._by_block[block_id] = _Entry(block_id, parent, token_ids, self._step)
        entries = self._by_parent.setdefault(parent, [])
        entries.append(entry)
        if len(entries) > _MAX_CANDIDATES:
            del self._by_block[entries.pop(0).block_id]

    def drop(self, block_id: int) -> None:
        """Forgets a block, because it will be written anew."""
        entry = self._by_block.pop(block_id, None)
        if entry is not None:
            entries = self._by_parent[entry.parent]
            entries.remove(entry)
            if not entries:
                del self._by_parent[entry.parent]

    def clear(self) -> None:
        """Forgets all."""
        self._by_block.clear()
        self._by_parent.clear()

    def find(self, parent: BlockHash, token_ids: array[int]) -> PartialHit | None:
        """The block after `parent` that begins with the most of these tokens, of which there is one at least;
        None if none begins with any.
        """
        best, longest, first = None, 0, token_ids[0]
        for entry in reversed(self._by_parent.get(parent, ())):
            if entry.token_ids[0] == first and entry.step < self._step:
                length = _common_length(entry.token_ids, token_ids)
                if length > longest:
                    best, longest = entry, length
        return None if best is None else PartialHit(best.block_id, longest)

    def check(self) -> None:
        """Asserts its invariants. For tests."""
        entries = [entry for each in self._by_parent.values() for entry in each]
        assert {entry.block_id: entry for entry in entries} == self._by_block
        assert len(entries) == len(self._by_block)
        assert all(0 < len(each) <= _MAX_CANDIDATES for each in self._by_parent.values())


def _common_length(a: array[int], b: array[int]) -> int:
    length = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        length += 1
    return length
