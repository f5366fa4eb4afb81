"""The KV blocks of one replica: their reference counts, their content, and the order of eviction.

Every block is either held (ref_count > 0) or in the free queue. A full block whose content is known has the
chained hash of all tokens up to its end; it can be found by that hash even when it is free, until it is
evicted and reused. The free queue is in order of eviction: least recently used first, and of the blocks that
one request releases, the tail of its sequence before the head. A block that is not full can be found by its
first tokens; only a few such blocks are kept while they are free.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pagewire.wire.block_hashes import ROOT_HASH, BlockHash
from scheduler.blocks.partial import PartialBlocks, Place
from scheduler.request import Request

# At most one in _KEPT_SHARE blocks, but at least _MIN_KEPT, may be free and kept only for its first tokens.
# Every request leaves one such block, and without a limit they would evict as many full ones.
_KEPT_SHARE = 32
_MIN_KEPT = 8


@dataclass(slots=True)
class CachedBlock:
    """A copy of what is known of a block that can be found by its content, for those who look at the pool.

    Attributes:
        block_hash: what it is found by.
        parent: what the block before it is, or was, found by.
        num_hits: how often requests found it.
    """

    block_id: int
    block_hash: BlockHash
    parent: BlockHash
    ref_count: int
    num_hits: int


class CacheListener(Protocol):
    """Told which cached blocks come and go. It may change nothing."""

    def stored(self, request: Request, index: int) -> None:
        """A request's block number `index` can be found now, by `request.block_hashes[index]`."""

    def removed(self, key: BlockHash) -> None:
        """What was found by this key is about to be overwritten; see `KVGroups.key`."""

    def cleared(self) -> None:
        """Nothing can be found any more."""


class _Block:
    """A block's state. `prev` and `next` link it into the free queue while nobody holds it."""

    __slots__ = ("block_hash", "block_id", "next", "num_hits", "parent", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: BlockHash | None = None
        self.parent: BlockHash = ROOT_HASH
        self.num_hits = 0
        self.prev: _Block = self
        self.next: _Block = self


class BlockPool:
    """All blocks of one KV pool.

    Args:
        num_blocks: how many there are.
        enable_caching: whether content is remembered; without it `publish` and `lookup` do nothing.

    Attributes:
        partial: the index of blocks by their first tokens.
        listener: told which cached blocks come and go; None if nobody wants to know.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self.listener: CacheListener | None = None
        self._enable_caching = enable_caching
        self._queue = _Block(-1)  # sentinel: its `next` is evicted first
        self._blocks = [_Block(block_id) for block_id in range(num_blocks)]
        self._by_hash: dict[BlockHash, _Block] = {}
        self._num_free = 0
        self.partial = PartialBlocks(num_blocks)
        self._kept: dict[int, None] = {}
        self._max_kept = max(_MIN_KEPT, num_blocks // _KEPT_SHARE)
        for block in self._blocks:
            self._link(block, self._queue.prev, self._queue)

    @property
    def num_free(self) -> int:
        """Blocks that no request holds, cached or not."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Blocks held by requests."""
        return self.num_blocks - self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by content."""
        return len(self._by_hash)

    def ref_count(self, block_id: int) -> int:
        """How many requests hold the block."""
        return self._blocks[block_id].ref_count

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, evicting their content. The caller has checked `num_free`."""
        assert count <= self._num_free, (count, self._num_free)
        taken, block, partial = [], self._queue.next, self.partial
        for _ in range(count):
            block.ref_count = 1
            block.num_hits = 0
            if block.block_hash is not None:
                del self._by_hash[block.block_hash]
                if self.listener is not None:
                    self.listener.removed(block.block_hash)
                block.block_hash = None
                self.num_evictions += 1
            elif block.block_id in self._kept:
                del self._kept[block.block_id]
            partial.drop(block.block_id)
            taken.append(block.block_id)
            block = block.next
        self._queue.next, block.prev = block, self._queue
        self._num_free -= count
        return taken

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether a cached block has this hash."""
        return block_hash in self._by_hash

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Ids of the cached blocks for the longest prefix of `hashes`."""
        found = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block.block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are in the free queue, so that acquiring them lowers `num_free`."""
        return sum(self._blocks[block_id].ref_count == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Adds a holder to blocks that `lookup` found."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                self._unlink(block)
                self._kept.pop(block_id, None)
            block.ref_count += 1
            block.num_hits += 1

    def publish(self, block_id: int, block_hash: BlockHash, parent: BlockHash = ROOT_HASH) -> bool:
        """Makes a held, full block findable by its hash. Of blocks with equal content only the first is.
        `parent` is the hash of the block before it. Returns whether there was none with this content.
        """
        if not self._enable_caching or block_hash in self._by_hash:
            return False
        block = self._blocks[block_id]
        assert block.ref_count > 0, block_id
        if block.block_hash is not None:
            return False
        block.block_hash = block_hash
        block.parent = parent
        self._by_hash[block_hash] = block
        return True

    def sample(self, stride: int) -> tuple[bytes, bytes]:
        """(reference counts, up to 255; whether content is cached, 1 or 0) of every `stride`-th block."""
        blocks = self._blocks[::stride]
        ref_counts = bytes([min(block.ref_count, 255) for block in blocks])
        return ref_counts, bytes([block.block_hash is not None for block in blocks])

    def recently_cached(self) -> Iterator[CachedBlock]:
        """The cached blocks, those published last first. Nothing may change meanwhile."""
        return map(_as_cached, reversed(self._by_hash.values()))

    def cached_hashes(self) -> Iterator[BlockHash]:
        """What cached blocks are found by, those published first first. Nothing may change meanwhile."""
        return iter(self._by_hash)

    def cached(self, block_hash: BlockHash) -> CachedBlock | None:
        """The cached block that has this hash, if there is one."""
        block = self._by_hash.get(block_hash)
        return None if block is None else _as_cached(block)

    def remember(self, block_id: int, place: Place, token_ids: array[int]) -> None:
        """Makes a held block findable by its first tokens; see `PartialBlocks.put`."""
        if not self._enable_caching:
            return
        forgotten = self.partial.put(block_id, place, token_ids)
        if forgotten in self._kept:
            self._keep_no_more(self._blocks[forgotten])

    def _keep_no_more(self, block: _Block) -> None:
        """Forgets a free block's first tokens and moves it to the front of the eviction order."""
        del self._kept[block.block_id]
        self.partial.drop(block.block_id)
        self._unlink(block)
        self._link(block, self._queue, self._queue.next)

    def release(self, block_ids: Sequence[int]) -> None:
        """Removes a holder from each block of a sequence, given head first. Blocks without holders become
        free: those that cannot be found are reused first, the others last, tail before head. Of those that
        can be found only by their first tokens, the latest are kept.
        """
        blocks, queue = self._blocks, self._queue
        for block_id in reversed(block_ids):
            block = blocks[block_id]
            assert block.ref_count > 0, block_id
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is not None:
                    self._link(block, queue.prev, queue)
                elif block_id in self.partial:
                    self._link(block, queue.prev, queue)
                    self._kept[block_id] = None
                    if len(self._kept) > self._max_kept:
                        self._keep_no_more(blocks[next(iter(self._kept))])
                else:
                    self._link(block, queue, queue.next)

    def forget(self) -> None:
        """Forgets all cached content, for example when the KV memory was lost. Reference counts stay."""
        for block in self._by_hash.values():
            block.block_hash = None
        self._by_hash.clear()
        if self.listener is not None:
            self.listener.cleared()
        self._kept.clear()
        self.partial.clear()

    def _link(self, block: _Block, before: _Block, after: _Block) -> None:
        block.prev, block.next = before, after
        before.next = after.prev = block
        self._num_free += 1

    def _unlink(self, block: _Block) -> None:
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = block
        self._num_free -= 1

    def check(self) -> None:
        """Walks the whole pool and asserts its invariants. For tests."""
        free, block = [], self._queue.next
        while block is not self._queue:
            assert block.next.prev is block
            free.append(block.block_id)
            block = block.next
        assert len(free) == len(set(free)) == self._num_free
        assert all((block.ref_count == 0) == (block.block_id in set(free)) for block in self._blocks)
        hashed = {block.block_hash: block for block in self._blocks if block.block_hash is not None}
        assert hashed == self._by_hash
        self.partial.check()
        kept = {i for i in free if i in self.partial and self._blocks[i].block_hash is None}
        assert set(self._kept) == kept
        assert len(kept) <= self._max_kept


def _as_cached(block: _Block) -> CachedBlock:
    assert block.block_hash is not None
    return CachedBlock(block.block_id, block.block_hash, block.parent, block.ref_count, block.num_hits)
