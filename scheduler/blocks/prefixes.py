"""The prefix cache: publishes requests' blocks, and finds cached blocks to share or copy."""

from __future__ import annotations

from scheduler.blocks.hashes import RecentChains
from scheduler.blocks.partial import PartialHit, Place
from scheduler.blocks.pool import BlockPool
from scheduler.request import Request
from scheduler.rows import IntArray, Rows

# Less than 1 / _LEAST_COPIED of a block is computed faster, together with other tokens, than copied.
_LEAST_COPIED = 4


class Prefixes:
    """Publishes blocks once they are full of known tokens that the steps planned so far compute, and finds
    them again. It owns `block_hashes` and `num_published_blocks` of requests; the scheduler owns pool and
    rows.

    Attributes:
        is_enabled: whether blocks are published and found; may be changed while nothing runs.
    """

    def __init__(self, block_size: int, pool: BlockPool, rows: Rows, *, enabled: bool) -> None:
        self._block_size = block_size
        self.is_enabled = enabled
        self._pool = pool
        self._rows = rows
        self._recent_chains = RecentChains(block_size)

    def find(self, request: Request) -> list[int]:
        """The cached blocks that a waiting request can share, for its longest cached prefix."""
        if not self.is_enabled:
            return []
        if not request.block_hashes:
            request.block_hashes = self._recent_chains.hash(request.token_ids, request.root_hash)
        num_blocks = request.num_reusable_tokens // self._block_size
        request.hash_up_to(num_blocks, self._block_size)
        return self._pool.lookup(request.block_hashes[:num_blocks])

    def find_partial(self, request: Request, num_blocks: int) -> PartialHit | None:
        """The block whose first tokens a waiting request can copy, for the block after the `num_blocks` that
        `find` found; None if there is none or copying does not pay. At least one token that needs no mask
        is left to compute.
        """
        if not self.is_enabled:
            return None
        start = num_blocks * self._block_size
        end = min(request.num_reusable_tokens - request.is_blocked, start + self._block_size)
        if end <= start:
            return None
        hit = self._pool.partial.find(self._place(request, num_blocks), request.token_ids[start:end])
        if hit is None:
            return None
        leaves_one = start + hit.num_tokens == len(request.token_ids) - 1
        return hit if leaves_one or hit.num_tokens * _LEAST_COPIED >= self._block_size else None

    def _place(self, request: Request, index: int) -> Place:
        """The place of a request's block number `index`."""
        return (request.block_hashes[index - 1] if index else request.root_hash, request.client)

    def publish_filled(self, rows: IntArray, ends: IntArray) -> None:
        """Publishes the blocks that became full when the requests in these rows grew to `ends` tokens."""
        state, at_border = self._rows, ends % self._block_size == 0
        rows = rows[at_border]
        if not len(rows):
            return
        ends = ends[at_border]
        ready = (state.num_known[rows] >= ends) & (state.num_computed[rows] >= ends)
        for request in state.holders(rows[ready]):
            self.publish(request)

    def publish(self, request: Request) -> None:
        """Publishes the full blocks of a running request."""
        computed = min(self._rows.num_computed.item(request.row), len(request.token_ids))
        full = min(computed // self._block_size, len(request.block_ids))
        first = request.num_published_blocks
        if full <= first or not self.is_enabled:
            return
        request.hash_up_to(full, self._block_size)
        for index in range(first, full):
            self._pool.publish(request.block_ids[index], request.block_hashes[index])
        request.num_published_blocks = full

    def publish_chunk(self, request: Request) -> None:
        """Publishes the blocks that a prefill chunk filled, for sharing and for copying in part. Blocks that
        decodes fill are only shared, because sequences diverge within a prompt or at an end.
        """
        first, size = request.num_published_blocks, self._block_size
        self.publish(request)
        if request.num_published_blocks == first:
            return
        tokens = request.token_ids
        for index in range(first, request.num_published_blocks):
            known = tokens[index * size : (index + 1) * size]
            self._pool.remember(request.block_ids[index], self._place(request, index), known)

    def publish_last(self, request: Request) -> None:
        """Makes the known, computed tokens of a running request's last, partly filled block findable. Steps
        in flight that go on after a request's end count as computed, though no block holds what they compute.
        """
        held = len(request.block_ids) * self._block_size
        end = min(self._rows.num_computed.item(request.row), len(request.token_ids), held)
        index = end // self._block_size
        if self.is_enabled and end % self._block_size and request.num_published_blocks == index:
            known = request.token_ids[index * self._block_size : end]
            self._pool.remember(request.block_ids[index], self._place(request, index), known)
