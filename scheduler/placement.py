"""Places requests' tokens in a step: allocates rows and blocks and fills the plan's columns.

The core decides which requests are scheduled and which are preempted; this module carries that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from engine.dispatch.limits import EngineLimits, fewest_blocks
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import U32, U32Array, u32
from scheduler.blocks.groups import KVGroups, WindowBlocks
from scheduler.blocks.pool import BlockPool
from scheduler.blocks.prefixes import Prefixes
from scheduler.policy.adapters import AdapterSlots
from scheduler.request import Request, Status
from scheduler.rows import IntArray, Rows, Wants
from scheduler.step import Draft


@dataclass(frozen=True, slots=True)
class Beginning:
    """The blocks and the first chunk of a request that is being admitted.

    Attributes:
        hits: ids of cached blocks that it shares; these and the new ones in the form of `Request.block_ids`.
        blocks: ids of newly allocated blocks.
        start: tokens that need no computing: those in `hits` and those copied into the first new block.
        count: tokens that this step computes, from `start`.
    """

    hits: list[int]
    blocks: list[int]
    start: int
    count: int


class Placement:
    """Assigns rows and blocks to requests and releases them. The scheduler owns pool, rows and prefixes."""

    def __init__(
        self,
        limits: EngineLimits,
        groups: KVGroups,
        pool: BlockPool,
        rows: Rows,
        prefixes: Prefixes,
        adapters: AdapterSlots,
    ) -> None:
        self._limits = limits
        self._block_size = limits.block_size
        self._groups = groups
        self._num_groups = groups.count
        self._pool = pool
        self._rows = rows
        self._prefixes = prefixes
        self._adapters = adapters
        self._windows: WindowBlocks | None = None
        if groups.has_windows:
            self._windows = WindowBlocks(groups, limits.block_size, pool, rows)

    def can_begin(self, request: Request) -> bool:
        """Whether a waiting request has tokens to compute, beyond its cached ones, other than its last. Only
        the last one needs a mask.
        """
        return self._prefixes.num_found(request) < len(request.token_ids) - 1

    def num_lacking(self, request: Request) -> int:
        """How many more blocks must become free to compute all tokens of a waiting request; 0 or less if
        there are enough. See `fewest_blocks`: in groups with windows not all tokens are held at once.
        """
        return self._num_lacking(request, self._groups.held(self._prefixes.find(request)))

    def _num_lacking(self, request: Request, shared: list[int]) -> int:
        """`shared` are the cached blocks that the request would hold."""
        needed = fewest_blocks(len(request.token_ids), self._block_size, self._groups.windows)
        return needed - len(shared) - (self._pool.num_free - self._pool.num_free_among(shared))

    def begin(self, draft: Draft, request: Request) -> Beginning | None:
        """Adds a waiting request to the step's new requests and allocates its blocks. Returns None and
        changes nothing if there are too few blocks for all of its tokens or the step has no room for it.
        """
        pool, num_tokens = self._pool, len(request.token_ids)
        hits = self._prefixes.find(request)
        shared, num_hits = self._groups.held(hits), len(hits) // self._num_groups
        num_lacking = self._num_lacking(request, shared)
        if num_lacking > 0:
            return None
        partial = self._prefixes.find_partial(request, num_hits)
        # The sources of the copies are held until the step is planned.
        sources = partial.sources if partial is not None else []
        if num_lacking + pool.num_free_among(sources) > 0:
            partial, sources = None, []
        start = num_hits * self._block_size + (partial.num_tokens if partial is not None else 0)
        count = draft.fit(request, start, min(num_tokens - request.is_blocked - start, draft.budget))
        if self._windows is not None:
            num_left = pool.num_free - pool.num_free_among(shared + sources)
            count = min(count, (num_hits + num_left // self._num_groups) * self._block_size - start)
        if count <= 0:
            return None
        pool.acquire(shared + sources)
        blocks = pool.allocate((-(-(start + count) // self._block_size) - num_hits) * self._num_groups)
        assert self._rows.next_free is not None
        new = NewRequest(
            self._rows.next_free,
            np.array(request.token_ids, dtype=U32),
            request.num_prompt_tokens,
            self._in_plan(hits + blocks),
            request.sampling,
            self._adapters.slot_of(request) + 1,
            request.request_id,
            request.trace,
            request.prediction,
        )
        if new.num_words > draft.words:
            pool.release(shared + blocks)
            pool.release(sources)
            return None
        # The first new block of each group begins with what is copied.
        draft.copied_blocks += zip(sources, blocks, strict=False)
        draft.words -= new.num_words
        draft.new_requests.append(new)
        return Beginning(hits, blocks, start, count)

    def _in_plan(self, block_ids: list[int]) -> U32Array:
        return u32(block_ids if self._groups.is_plain else self._groups.by_group(block_ids))

    def enter(self, request: Request, beginning: Beginning) -> None:
        """Puts an admitted request into its row, with its cached blocks."""
        request.status = Status.RUNNING
        request.block_ids = beginning.hits
        request.num_published_blocks = len(beginning.hits) // self._num_groups
        self._rows.enter(request, beginning.start)
        if self._windows is not None:
            self._windows.enter(request)

    def leave(self, request: Request) -> None:
        """Releases a request's row and blocks."""
        self._prefixes.publish_last(request)
        self._pool.release(self._groups.held(request.block_ids))
        request.block_ids = []
        request.num_published_blocks = 0
        self._rows.leave(request)

    def within_reach(self, request: Request, count: int) -> int:
        """How many of `count` tokens a running request can compute in free blocks, but at least one. Where
        there are windows, a request that computes less in a step holds less; so nobody makes room for more.
        """
        if self._windows is None or count <= 1:
            return count
        return max(1, self.in_free_blocks(request, count)[0])

    def in_free_blocks(self, request: Request, count: int) -> tuple[int, int]:
        """(how many of `count` tokens a running request can compute in free blocks, how many of these blocks
        it takes); either may be 0 or less.
        """
        num_free = self._pool.num_free // self._num_groups * self._num_groups
        count = min(count, self._end_with(request, num_free) - int(self._rows.num_computed[request.row]))
        return count, min(self.num_needed(request, count), num_free)

    def _end_with(self, request: Request, num_blocks: int) -> int:
        """How many tokens a running request has room for if it gets as many more blocks."""
        return (len(request.block_ids) + num_blocks) // self._num_groups * self._block_size

    def num_needed(self, request: Request, count: int) -> int:
        """New blocks that a running request needs to compute `count` more tokens, wherever the drafts of
        steps in flight take it; 0 or less if none.
        """
        state, row = self._rows, request.row
        end = int(state.num_computed[row]) + count
        if state.num_drafts[row]:
            last = int(state.max_total[row]) - 1  # the last token has no KV
            end = max(end, min(end + int(state.num_drafts[row]), last))
        return -(-end // self._block_size) * self._num_groups - len(request.block_ids)

    def place(
        self, draft: Draft, request: Request, count: int, blocks: list[int], *, appended: list[int]
    ) -> None:
        """Adds `count` tokens of a running request to the step, with the new blocks that hold them.
        `appended` are the blocks that the plan has to append, because no NewRequest lists them.
        """
        state, row = self._rows, request.row
        start = int(state.num_computed[row])
        end = start + count
        samples = bool(end == state.num_tokens[row]) and not request.is_pooling
        draft.place(request, start=start, count=count, samples=samples, blocks=appended)
        request.block_ids += blocks
        state.num_held[row] += len(blocks) // self._num_groups * self._block_size
        state.num_computed[row] = end
        state.num_tokens[row] += samples
        state.blocked[row] |= samples and request.constraint is not None
        self._prefixes.publish_chunk(request)
        if samples and start < request.num_prompt_tokens:
            self._prefixes.publish_last(request)

    def new_draft(self) -> Draft:
        """An empty draft of the next step. It may copy blocks that earlier steps compute."""
        self._pool.partial.begin_step()
        return Draft(self._limits)

    def plan(self, draft: Draft, step_id: int) -> StepPlan:
        """Makes the plan from the draft, and releases what no later step reads: the sources of its block
        copies and the blocks behind windows.
        """
        for source, _ in draft.copied_blocks:
            self._pool.release([source])
        if self._windows is not None:
            self._windows.give_back(draft.scheduled_rows)
        return draft.plan(step_id, self._rows.take_freed())

    def most_drafts(self, draft: Draft, wants: Wants) -> tuple[IntArray, int]:
        """(the most drafts of each request in `wants.decoding`: none can take it beyond its end, and where
        some tokens may not come before a number of others, the position must be known; the most of all
        together).
        """
        state, rows = self._rows, wants.decoding_rows
        to_come = state.max_total[rows] - state.num_tokens[rows]
        may_have = state.num_tokens[rows] >= state.drafts_from[rows]
        return np.where(may_have, np.maximum(to_come - 1, 0), 0), draft.budget - wants.num_singles

    def decode_all(self, draft: Draft, wants: Wants, drafts: IntArray | None = None) -> bool:
        """Schedules one token for every request in `wants.decoding`, and so many drafts. Returns False and
        changes nothing if token budget or blocks are short.
        """
        state, rows = self._rows, wants.decoding_rows
        if not len(rows):
            return True
        if self._limits.max_drafts:
            return self._decode_with_drafts(draft, wants, drafts)
        starts = state.num_computed[rows]
        grown = starts == state.num_held[rows]
        growing = rows[grown]
        if wants.num_singles > draft.budget or len(growing) * self._num_groups > self._pool.num_free:
            return False
        blocks = self._grow(growing) if len(growing) else []
        draft.place_decodes(wants, starts=starts, grown=grown.astype(np.int64), blocks=blocks)
        ends = starts + 1
        state.num_computed[rows] = ends
        state.num_tokens[rows] = ends + 1
        wants.num_steps = max(wants.num_steps - 1, 0)
        self._prefixes.publish_filled(rows, ends)
        return True

    def _decode_with_drafts(self, draft: Draft, wants: Wants, drafts: IntArray | None) -> bool:
        state, rows = self._rows, wants.decoding_rows
        if wants.num_singles > draft.budget:
            return False
        starts = state.num_computed[rows]
        ends = starts + 1
        furthest = ends + state.num_drafts[rows]
        if drafts is not None:
            furthest = furthest + drafts
        # The last token has no KV.
        furthest = np.maximum(np.minimum(furthest, state.max_total[rows] - 1), ends)
        added = np.maximum(-(-(furthest - state.num_held[rows]) // self._block_size), 0)
        num_blocks = int(added.sum()) * self._num_groups
        if num_blocks > self._pool.num_free:
            return drafts is not None and self._decode_with_drafts(draft, wants, None)
        blocks = self._pool.allocate(num_blocks) if num_blocks else []
        given = iter(blocks)
        for request, count in zip(wants.decoding, added.tolist(), strict=True) if blocks else ():
            request.block_ids += islice(given, count * self._num_groups)
        state.num_held[rows] += added * self._block_size
        draft.place_decodes(wants, starts=starts, grown=added, blocks=blocks, drafts=drafts)
        state.num_computed[rows] = ends
        state.num_tokens[rows] = ends + 1
        if drafts is not None:
            state.num_drafts[rows] += drafts
        wants.num_steps = max(wants.num_steps - 1, 0)
        self._prefixes.publish_filled(rows, ends)
        return True

    def _grow(self, rows: IntArray) -> list[int]:
        """Allocates a block of each KV group for each of these rows' requests; returns the block ids."""
        blocks, count = self._pool.allocate(len(rows) * self._num_groups), self._num_groups
        for index, request in enumerate(self._rows.holders(rows)):
            request.block_ids += blocks[index * count : (index + 1) * count]
        self._rows.num_held[rows] += self._block_size
        return blocks
