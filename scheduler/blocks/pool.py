"""The KV blocks of one replica: who holds them, what they contain, which goes next when memory is short.

Every block is either held (ref_count > 0) or in the free queue. A full block whose content is known carries
the chained hash of all tokens up to its end; it stays findable by that hash after its last holder let go,
until it is evicted to be written anew. The free queue is in order of eviction: least recently used first, and
of the blocks that a request lets go, the tail of its sequence before the head. A block that is not full can
be found by its first tokens; of those that are free, few are kept among the others.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from scheduler.blocks.hashes import BlockHash
from scheduler.blocks.partial import PartialBlocks, Place

# Of the pool's blocks, the part that may be free and kept for their first tokens alone; and at least so many.
# Every request leaves one, which would push as many full ones out.
_KEPT_SHARE = 32
_MIN_KEPT = 8


class _Block:
    """A block's state. `prev` and `next` link it into the free queue while nobody holds it."""

    __slots__ = ("block_hash", "block_id", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: BlockHash | None = None
        self.prev: _Block = self
        self.next: _Block = self


class BlockPool:
    """All blocks of one KV pool.

    Args:
        num_blocks: how many there are.
        enable_caching: whether content is remembered; without it `publish` and `lookup` do nothing.

    Attributes:
        partial: the blocks that can be found by their first tokens.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
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
        """Blocks that nobody holds, cached or not."""
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
            if block.block_hash is not None:
                del self._by_hash[block.block_hash]
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

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Block ids of the longest run of these hashes, from the first, that is cached."""
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

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Makes a held, full block findable by its content. Of several with equal content the first stays."""
        if not self._enable_caching or block_hash in self._by_hash:
            return
        block = self._blocks[block_id]
        assert block.ref_count > 0, block_id
        if block.block_hash is None:
            block.block_hash = block_hash
            self._by_hash[block_hash] = block

    def remember(self, block_id: int, place: Place, token_ids: array[int]) -> None:
        """Makes a held block findable by its first tokens; see `PartialBlocks.put`."""
        if not self._enable_caching:
            return
        forgotten = self.partial.put(block_id, place, token_ids)
        if forgotten in self._kept:
            self._keep_no_more(self._blocks[forgotten])

    def _keep_no_more(self, block: _Block) -> None:
        """Makes a free block the next to be evicted, as nothing finds it."""
        del self._kept[block.block_id]
        self.partial.drop(block.block_id)
        self._unlink(block)
        self._link(block, self._queue, self._queue.next)

    def release(self, block_ids: Sequence[int]) -> None:
        """Removes a holder from each block of a sequence, given head first. Blocks that nobody holds any
        more become free: those that nothing finds are reused first, the others last, tail before head. Of
        those that are found by their first tokens alone, the latest are kept.
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
        """Forgets all content, as when the KV memory was lost. Holders stay."""
        for block in self._by_hash.values():
            block.block_hash = None
        self._by_hash.clear()
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
