"""KV groups: layers of different reach keep different blocks of the same request.

The layers of a group see equally far, and share a block table. All groups take their blocks from one pool. A
request's `block_ids` has a block of each group for every `block_size` tokens, so that all tables grow
together; where a group's window has passed, `NO_BLOCK` is left in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagewire.wire.block_hashes import HASH_BYTES, BlockHash
from scheduler.blocks.partial import Place
from scheduler.blocks.pool import BlockPool
from scheduler.request import Request
from scheduler.rows import IntArray, Rows

NO_BLOCK = -1
"""In a request's `block_ids`: the group's layers see nothing any more of what was here."""


class KVGroups:
    """The KV groups of a model.

    Args:
        windows: how many tokens the layers of each group see, a token's own included; 0 for no limit.
        block_size: tokens per block.

    Attributes:
        count: how many groups there are.
        has_windows: whether any group gives blocks back while a request runs.
        is_plain: whether one group without a window is all there is. Blocks are then found by their hashes
            alone.
        told: the group whose blocks others are told of, one that keeps whole prefixes where there is one.
    """

    def __init__(self, windows: Sequence[int], block_size: int) -> None:
        self.windows = tuple(windows)
        self.count = len(windows)
        self.has_windows = any(windows)
        self.is_plain = self.windows == (0,)
        self._block_size = block_size
        # What tells the blocks of different groups apart. The first group's keys are the hashes themselves.
        self._suffixes = [bytes([group] if group else []) for group in range(self.count)]
        self._full = [group for group, window in enumerate(windows) if not window]
        self._windowed = [group for group, window in enumerate(windows) if window]
        self.told = self._full[0] if self._full else 0
        # Those of them whose layers see more than the token that they compute.
        self._reaching = [group for group in self._windowed if windows[group] > 1]

    def key(self, block_hash: BlockHash, group: int) -> BlockHash:
        """What a group's block of this hash is found by."""
        return block_hash + self._suffixes[group]

    def told_hash(self, key: BlockHash) -> BlockHash | None:
        """The hash of a block of the group that others are told of; None for the keys of other groups."""
        suffix = self._suffixes[self.told]
        if len(key) != HASH_BYTES + len(suffix) or not key.endswith(suffix):
            return None
        return key[:HASH_BYTES]

    def place(self, first: Place, group: int) -> Place:
        """A group's place where the first group's is `first`."""
        parent, client = first
        return (self.key(parent, group), client) if group else first

    def first_seen(self, group: int, num_blocks: int) -> int:
        """The first block that a group's layers see of when they compute the token behind `num_blocks`."""
        window = self.windows[group]
        return max(0, num_blocks * self._block_size - window + 1) // self._block_size if window else 0

    def blocks_at(self, block_ids: Sequence[int], index: int) -> Sequence[int]:
        """The blocks of all groups for block number `index` of a request."""
        return block_ids[index * self.count : (index + 1) * self.count]

    def held(self, block_ids: list[int]) -> list[int]:
        """The blocks of a request, without those given back."""
        return [block_id for block_id in block_ids if block_id != NO_BLOCK] if self.has_windows else block_ids

    def by_group(self, block_ids: Sequence[int]) -> list[int]:
        """A request's block ids as plans carry them: those of each group after those of the group before, and
        0 for those given back.
        """
        in_turn = np.array(block_ids, np.int64).reshape(-1, self.count)
        ids: list[int] = np.maximum(in_turn, 0).T.reshape(-1).tolist()
        return ids

    def lookup(self, pool: BlockPool, hashes: Sequence[BlockHash]) -> list[int]:
        """The cached blocks of all groups for the longest usable prefix of `hashes`.

        A prefix is usable if every group without a window has all of its blocks, and every other those that
        the token behind it sees.
        """
        end, tables = len(hashes), []
        for group in self._full:
            suffix = self._suffixes[group]
            tables.append(pool.lookup(block_hash + suffix for block_hash in hashes[:end]))
            end = len(tables[-1])
        end = self._end_in_windows(pool, hashes, end)
        hits = [NO_BLOCK] * (end * self.count)
        for group, table in zip(self._full, tables, strict=True):
            hits[group :: self.count] = table[:end]
        for group in self._windowed:
            first, suffix = self.first_seen(group, end), self._suffixes[group]
            found = pool.lookup(block_hash + suffix for block_hash in hashes[first:end])
            hits[first * self.count + group :: self.count] = found
        return hits

    def _end_in_windows(self, pool: BlockPool, hashes: Sequence[BlockHash], end: int) -> int:
        """The most of the first `end` blocks behind which every group with a window has what it sees."""
        if not self._reaching:
            return end
        suffix = self._suffixes[self._reaching[0]]
        while end and hashes[end - 1] + suffix not in pool:  # no more is looked at of most new prompts
            end -= 1
        index, firsts = end - 1, self._firsts_seen(end)
        # Once a block is missing, only prefixes that end before it are left: none is looked at twice.
        while index >= min(firsts):
            if any(
                index >= first and hashes[index] + self._suffixes[group] not in pool
                for group, first in zip(self._reaching, firsts, strict=True)
            ):
                end, firsts = index, self._firsts_seen(index)
            index -= 1
        return end

    def _firsts_seen(self, end: int) -> list[int]:
        return [self.first_seen(group, end) for group in self._reaching]


class WindowBlocks:
    """Gives back the blocks behind windows. The scheduler owns pool and rows.

    A step reads no block behind the window of its first token. So a block can be given back as soon as the
    last step that reads it is planned: workers run steps in order, and whoever gets the block writes to it in
    a later one.
    """

    def __init__(self, groups: KVGroups, block_size: int, pool: BlockPool, rows: Rows) -> None:
        self._groups = groups
        self._block_size = block_size
        self._pool = pool
        self._rows = rows
        self._windows = sorted(set(groups.windows) - {0})
        self._members = [
            [group for group, window in enumerate(groups.windows) if window == each] for each in self._windows
        ]
        # For each window and row, the first block that the row's request holds in its groups.
        self._first = np.zeros((len(self._windows), len(rows.requests)), np.int64)

    def enter(self, request: Request) -> None:
        """Notes what a request holds that has just got its row."""
        num_blocks = len(request.block_ids) // self._groups.count
        self._first[:, request.row] = [
            self._groups.first_seen(members[0], num_blocks) for members in self._members
        ]

    def give_back(self, rows: IntArray) -> None:
        """Releases what no later step reads of the requests in these rows, which have just been planned."""
        num_computed = self._rows.num_computed[rows]
        for window, members, first in zip(self._windows, self._members, self._first, strict=True):
            seen = np.maximum(num_computed - window + 1, 0) // self._block_size
            passed = seen > first[rows]
            if passed.any():
                late, ends = rows[passed], seen[passed]
                for request, begin, end in zip(
                    self._rows.holders(late), first[late].tolist(), ends.tolist(), strict=True
                ):
                    self._drop(request, members, begin, end)
                first[late] = ends

    def _drop(self, request: Request, members: Sequence[int], begin: int, end: int) -> None:
        """Releases blocks number `begin` to `end` of a request in some groups."""
        count, block_ids = self._groups.count, request.block_ids
        for group in members:
            passed = slice(begin * count + group, end * count, count)
            self._pool.release(block_ids[passed])
            block_ids[passed] = [NO_BLOCK] * (end - begin)
