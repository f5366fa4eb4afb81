"""Puts requests' tokens into a step: into rows, blocks and the plan's columns.

Who is served and who makes room is the core's business; this is what it takes to serve one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import NewRequest, StepPlan
from engine.dispatch.sampling import U32, u32
from scheduler.blocks.pool import BlockPool
from scheduler.blocks.prefixes import Prefixes
from scheduler.request import Request, Status
from scheduler.rows import IntArray, Rows, Wants
from scheduler.step import Draft


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a request that takes a row begins with.

    Attributes:
        hits: cached blocks, which it shares.
        blocks: blocks of its own.
        start: tokens in the hits, and those copied to the first of its own blocks.
        count: tokens that the step computes after those.
    """

    hits: list[int]
    blocks: list[int]
    start: int
    count: int


class Placement:
    """Gives rows and blocks to requests and takes them away. Pool, rows and prefixes are the scheduler's."""

    def __init__(self, limits: EngineLimits, pool: BlockPool, rows: Rows, prefixes: Prefixes) -> None:
        self._limits = limits
        self._block_size = limits.block_size
        self._pool = pool
        self._rows = rows
        self._prefixes = prefixes

    def can_begin(self, request: Request) -> bool:
        """Whether anything but the last token of a waiting request is left to compute."""
        return len(self._prefixes.find(request)) * self._block_size < len(request.token_ids) - 1

    def num_lacking(self, request: Request) -> int:
        """How many more blocks would have to be free for all of a waiting request's tokens."""
        return self._num_lacking(request, self._prefixes.find(request))

    def _num_lacking(self, request: Request, hits: list[int]) -> int:
        num_blocks = -(-len(request.token_ids) // self._block_size) - len(hits)
        return num_blocks - (self._pool.num_free - self._pool.num_free_among(hits))

    def begin(self, draft: Draft, request: Request) -> Beginning | None:
        """Adds a waiting request to the step's new ones and allocates its blocks; None, and nothing done, if
        blocks for all of its tokens, or the step's budget, are short.
        """
        pool, num_tokens = self._pool, len(request.token_ids)
        hits = self._prefixes.find(request)
        num_lacking = self._num_lacking(request, hits)
        if num_lacking > 0:
            return None
        partial = self._prefixes.find_partial(request, len(hits))
        # What is copied from is held until the step is planned.
        sources = [partial.block_id] if partial is not None else []
        if num_lacking + pool.num_free_among(sources) > 0:
            partial, sources = None, []
        start = len(hits) * self._block_size + (partial.num_tokens if partial is not None else 0)
        count = draft.fit(request, start, min(num_tokens - request.is_blocked - start, draft.budget))
        if count <= 0:
            return None
        pool.acquire(hits + sources)
        blocks = pool.allocate(-(-(start + count) // self._block_size) - len(hits))
        assert self._rows.next_free is not None
        new = NewRequest(
            self._rows.next_free,
            np.array(request.token_ids, dtype=U32),
            request.num_prompt_tokens,
            u32(hits + blocks),
            request.sampling,
            request.adapter_id,
        )
        if new.num_words > draft.words:
            pool.release(hits + blocks)
            pool.release(sources)
            return None
        draft.copied_blocks += [(source, blocks[0]) for source in sources]
        draft.words -= new.num_words
        draft.new_requests.append(new)
        return Beginning(hits, blocks, start, count)

    def enter(self, request: Request, beginning: Beginning) -> None:
        """Gives a request its row and its hits."""
        request.status = Status.RUNNING
        request.block_ids = beginning.hits
        request.num_published_blocks = len(beginning.hits)
        self._rows.enter(request, beginning.start)

    def leave(self, request: Request) -> None:
        """Takes row and blocks from a request."""
        self._prefixes.publish_last(request)
        self._pool.release(request.block_ids)
        request.block_ids = []
        request.num_published_blocks = 0
        self._rows.leave(request)

    def num_needed(self, request: Request, count: int) -> int:
        """Blocks that `count` more tokens of a running request take; 0 or less if it holds enough."""
        state, row, most = self._rows, request.row, self._limits.max_tokens_per_step
        end = int(state.num_computed[row]) + count
        if most > 1:  # those that the steps in flight, and this one, may gain it besides
            num_steps = int(state.num_tokens[row] - state.num_known[row]) + 1
            end = min(end + num_steps * (most - 1), int(state.max_total[row]))
        return -(-end // self._block_size) - len(request.block_ids)

    def place(
        self, draft: Draft, request: Request, count: int, blocks: list[int], *, appended: list[int]
    ) -> None:
        """Adds `count` tokens of a running request to the step, with the new blocks that hold them;
        `appended` are those that the worker does not know from a NewRequest.
        """
        state, row = self._rows, request.row
        start = int(state.num_computed[row])
        end = start + count
        samples = bool(end == state.num_tokens[row]) and not request.is_pooling
        draft.place(request, start=start, count=count, samples=samples, blocks=appended)
        request.block_ids += blocks
        state.num_held[row] += len(blocks) * self._block_size
        state.num_computed[row] = end
        state.num_tokens[row] += samples
        state.blocked[row] |= samples and request.constraint is not None
        self._prefixes.publish_chunk(request)
        if samples and start < request.num_prompt_tokens:
            self._prefixes.publish_last(request)

    def new_draft(self) -> Draft:
        """A step to be planned. What the steps before it compute may be copied in it."""
        self._pool.partial.begin_step()
        return Draft(self._limits)

    def plan(self, draft: Draft, step_id: int) -> StepPlan:
        """The step as it stands; what is copied in it is let go."""
        for source, _ in draft.copied_blocks:
            self._pool.release([source])
        return draft.plan(step_id, self._rows.take_freed())

    def decode_all(self, draft: Draft, wants: Wants) -> bool:
        """Gives every decoding request its token; False, and nothing done, if budget or blocks are short."""
        state, rows = self._rows, wants.decoding_rows
        if not len(rows):
            return True
        if self._limits.max_tokens_per_step > 1:
            return False
        starts = state.num_computed[rows]
        grown = starts == state.num_held[rows]
        growing = rows[grown]
        if wants.num_singles > draft.budget or len(growing) > self._pool.num_free:
            return False
        blocks = self._grow(growing) if len(growing) else []
        draft.place_decodes(wants, starts=starts, grown=grown, blocks=blocks)
        ends = starts + 1
        state.num_computed[rows] = ends
        state.num_tokens[rows] = ends + 1
        wants.num_steps = max(wants.num_steps - 1, 0)
        self._prefixes.publish_filled(rows, ends)
        return True

    def _grow(self, rows: IntArray) -> list[int]:
        """Gives each of these rows' requests a block; returns the blocks."""
        blocks = self._pool.allocate(len(rows))
        for request, block_id in zip(self._rows.holders(rows), blocks, strict=True):
            request.block_ids.append(block_id)
        self._rows.num_held[rows] += self._block_size
        return blocks
