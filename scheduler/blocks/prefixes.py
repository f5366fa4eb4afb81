"""The prefix cache: publishes requests' blocks, and finds cached blocks to share or copy."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.wire.block_hashes import BlockHash, RecentChains
from scheduler.blocks.groups import NO_BLOCK, KVGroups
from scheduler.blocks.partial import PartialHit, Place
from scheduler.blocks.pool import BlockPool
from scheduler.request import Request
from scheduler.rows import IntArray, Rows

# Less than 1 / _LEAST_COPIED of a block is computed faster, together with other tokens, than copied.
_LEAST_COPIED = 4


@dataclass(frozen=True, slots=True)
class PartialCopy:
    """Blocks whose first tokens are a request's next tokens, to be copied.

    Attributes:
        sources: ids of the blocks, one in each KV group.
        num_tokens: how many tokens match in all of them.
    """

    sources: list[int]
    num_tokens: int


class Prefixes:
    """Publishes blocks once they are full of known tokens that the steps planned so far compute, and finds
    them again. It owns `block_hashes` and `num_published_blocks` of requests; the scheduler owns pool and
    rows.

    Attributes:
        is_enabled: whether blocks are published and found; may be changed while nothing runs.
    """

    def __init__(
        self, block_size: int, groups: KVGroups, pool: BlockPool, rows: Rows, *, enabled: bool
    ) -> None:
        self._block_size = block_size
        self._groups = groups
        self.is_enabled = enabled
        self._pool = pool
        self._rows = rows
        self._recent_chains = RecentChains(block_size)

    def told_hash(self, key: BlockHash) -> BlockHash | None:
        """See `KVGroups.told_hash`."""
        return self._groups.told_hash(key)

    def find(self, request: Request) -> list[int]:
        """The cached blocks that a waiting request can share, for its longest cached prefix; in the form of
        `Request.block_ids`.
        """
        if not self.is_enabled:
            return []
        if not request.block_hashes:
            request.block_hashes = self._recent_chains.hash(request.token_ids, request.root_hash)
        num_blocks = request.num_reusable_tokens // self._block_size
        request.hash_up_to(num_blocks, self._block_size)
        hashes = request.block_hashes[:num_blocks]
        return self._pool.lookup(hashes) if self._groups.is_plain else self._groups.lookup(self._pool, hashes)

    def num_found(self, request: Request) -> int:
        """Tokens of a waiting request in the blocks that it can share."""
        return len(self.find(request)) // self._groups.count * self._block_size

    def find_partial(self, request: Request, num_blocks: int) -> PartialCopy | None:
        """The blocks whose first tokens a waiting request can copy, for the block after the `num_blocks` that
        `find` found; None if there are none or copying does not pay. At least one token that needs no mask
        is left to compute.
        """
        if not self.is_enabled:
            return None
        start = num_blocks * self._block_size
        end = min(request.num_reusable_tokens - request.is_blocked, start + self._block_size)
        if end <= start:
            return None
        hits: list[PartialHit] = []
        place, tokens = self._place(request, num_blocks), request.token_ids[start:end]
        for group in range(self._groups.count):
            hit = self._pool.partial.find(self._groups.place(place, group), tokens)
            if hit is None:
                return None
            hits.append(hit)
        num_tokens = min(hit.num_tokens for hit in hits)
        if start + num_tokens < len(request.token_ids) - 1 and num_tokens * _LEAST_COPIED < self._block_size:
            return None
        return PartialCopy([hit.block_id for hit in hits], num_tokens)

    def _place(self, request: Request, index: int) -> Place:
        """The place of a request's block number `index`, in the first KV group."""
        return (request.block_hashes[index - 1] if index else request.root_hash, request.client)

    def _remember(self, request: Request, index: int, num_tokens: int) -> None:
        """Makes a request's blocks number `index` findable by their first `num_tokens` tokens."""
        begin, place = index * self._block_size, self._place(request, index)
        known = request.token_ids[begin : begin + num_tokens]
        if self._groups.is_plain:
            self._pool.remember(request.block_ids[index], place, known)
            return
        for group, block_id in enumerate(self._groups.blocks_at(request.block_ids, index)):
            if block_id != NO_BLOCK:
                self._pool.remember(block_id, self._groups.place(place, group), known)

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
        full = min(computed // self._block_size, len(request.block_ids) // self._groups.count)
        first = request.num_published_blocks
        if full <= first or not self.is_enabled:
            return
        request.hash_up_to(full, self._block_size)
        if self._groups.is_plain:
            parent = request.block_hashes[first - 1] if first else request.root_hash
            for index in range(first, full):
                block_hash = request.block_hashes[index]
                is_new = self._pool.publish(request.block_ids[index], block_hash, parent)
                if is_new and self._pool.listener is not None:
                    self._pool.listener.stored(request, index)
                parent = block_hash
        else:
            self._publish_in_groups(request, range(first, full))
        request.num_published_blocks = full

    def _publish_in_groups(self, request: Request, indices: range) -> None:
        for index in indices:
            parent = request.block_hashes[index - 1] if index else request.root_hash
            for group, block_id in enumerate(self._groups.blocks_at(request.block_ids, index)):
                if block_id != NO_BLOCK:
                    key = self._groups.key(request.block_hashes[index], group)
                    is_new = self._pool.publish(block_id, key, self._groups.key(parent, group))
                    if is_new and group == self._groups.told and self._pool.listener is not None:
                        self._pool.listener.stored(request, index)

    def publish_chunk(self, request: Request) -> None:
        """Publishes the blocks that a prefill chunk filled, for sharing and for copying in part. Blocks that
        decodes fill are only shared, because sequences diverge within a prompt or at an end.
        """
        first = request.num_published_blocks
        self.publish(request)
        for index in range(first, request.num_published_blocks):
            self._remember(request, index, self._block_size)

    def publish_last(self, request: Request) -> None:
        """Makes the known, computed tokens of a running request's last, partly filled block findable. Steps
        in flight that go on after a request's end count as computed, though no block holds what they compute.
        """
        held = len(request.block_ids) // self._groups.count * self._block_size
        end = min(self._rows.num_computed.item(request.row), len(request.token_ids), held)
        index = end // self._block_size
        if self.is_enabled and end % self._block_size and request.num_published_blocks == index:
            self._remember(request, index, end % self._block_size)
