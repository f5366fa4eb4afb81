"""The core's records of a step: the draft, the step in flight and its output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import NO_COPIES, NewRequest, PromptLogprobs, StepPlan, TokenLogprobs
from engine.dispatch.sampling import U32, F32Array, U32Array, u32
from scheduler.policy.step_time import PromptTime, StepTimes, StepWork
from scheduler.request import Request, Status
from scheduler.rows import IntArray, Wants

# The most requests that a log line names.
_MAX_NAMED = 4


@dataclass(slots=True)
class Counters:
    """Totals since the start.

    Attributes:
        num_drafts: how often drafts were proposed for a request.
        num_draft_tokens, num_accepted_tokens: draft tokens in them, and those accepted.
        num_accepted_at: accepted draft tokens by their place, the first draft of a request first.
    """

    num_steps: int = 0
    num_short_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    num_quarantined: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_at: list[int] = field(default_factory=list)

    def snapshot(self) -> Counters:
        """What they are now."""
        return replace(self, num_accepted_at=list(self.num_accepted_at))

    def since(self, before: Counters) -> Counters:
        """What has been counted since a snapshot."""
        counted = {
            name: value - getattr(before, name)
            for name, value in asdict(self).items()
            if isinstance(value, int)
        }
        places = zip(self.num_accepted_at, before.num_accepted_at, strict=True)
        return Counters(**counted, num_accepted_at=[now - then for now, then in places])

    def count_drafts(self, proposed: IntArray, gained: IntArray) -> None:
        """Counts a step's drafts: how many were proposed for each request, and how many tokens it gained."""
        accepted = np.where(proposed > 0, np.maximum(gained - 1, 0), 0)
        self.num_drafts += int(np.count_nonzero(proposed))
        self.num_draft_tokens += int(proposed.sum())
        self.num_accepted_tokens += int(accepted.sum())
        for place in range(int(accepted.max(initial=0))):
            self.num_accepted_at[place] += int(np.count_nonzero(accepted > place))


@dataclass(slots=True)
class StepOutput:
    """What a step produced for requests.

    Attributes:
        requests: the request of each sampled token, in the plan's order.
        token_ids: the sampled tokens.
        logprobs: index into `requests` and `token_ids` -> log probabilities.
        prompt_logprobs: requests and their new prompt logprobs. Report these before the tokens.
        pooled: requests that ended with a pooled state, and the state.
        ended: requests that ended. Report these after the tokens; `end_reason` says why.
    """

    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Request, PromptLogprobs]] = field(default_factory=list)
    pooled: list[tuple[Request, F32Array]] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> Iterable[tuple[Request, int]]:
        """Each sampled token with its request."""
        return zip(self.requests, self.token_ids, strict=True)

    def without_ended(self) -> StepOutput:
        """A copy without the tokens of requests that have already ended."""
        kept = [index for index, request in enumerate(self.requests) if request.status is not Status.ENDED]
        return StepOutput(
            [self.requests[index] for index in kept],
            [self.token_ids[index] for index in kept],
            {place: self.logprobs[index] for place, index in enumerate(kept) if index in self.logprobs},
        )


@dataclass(slots=True)
class InFlight:
    """A dispatched step: which requests it computes and which of them it samples.

    Attributes:
        sampled_rows, sampled_arrivals: the rows and arrival numbers of `sampled` at planning time.
        work: the amount of work in it.
        void: an earlier step failed after this one was planned, so this one's result is discarded.
        drafts: the most drafts of each of `sampled`; None if there are none.
    """

    step_id: int
    scheduled: list[Request]
    sampled: list[Request]
    sampled_rows: IntArray
    sampled_arrivals: IntArray
    work: StepWork
    void: bool = False
    drafts: IntArray | None = None

    def describe(self) -> str:
        """A readable description, for logs and errors."""
        names = [request.request_id for request in self.scheduled]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        num_requests = "1 request" if len(names) == 1 else f"{len(names)} requests"
        return f"step {self.step_id} with {num_requests} ({', '.join(names[:_MAX_NAMED])}{more})"

    def request_at(self, column: int) -> Request:
        """The request in a column of the plan.

        Raises:
            ValueError: the plan has no such column: the worker is broken.
        """
        if column >= len(self.scheduled):
            raise ValueError(f"step {self.step_id} has {len(self.scheduled)} columns, and no number {column}")
        return self.scheduled[column]


class Draft:
    """A step being planned: the plan's columns, filled from the left.

    Attributes:
        budget: token budget left.
        words: 32-bit words left in the plan record for the data of new requests.
        num_prompt_logprobs, num_pooled: how many more prompt tokens with logprobs, and pooled states, fit
            into the result record.
        scheduled: requests in the step.
        sampled: those of them that sample a token.
        new_requests: see StepPlan; the caller that appends one also places its tokens.
        copied_blocks: see StepPlan; the source blocks are held.
        work: the amount of work placed so far.
        prompt_time: limits the prompt tokens in the step by time; None if there is no time target.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.budget = limits.max_num_batched_tokens
        self.words = limits.max_new_words
        self.num_prompt_logprobs, self.num_pooled = limits.max_prompt_logprobs, limits.max_pooled
        self.scheduled: list[Request] = []
        self.sampled: list[Request] = []
        self.new_requests: list[NewRequest] = []
        self.copied_blocks: list[tuple[int, int]] = []
        self.work = StepWork()
        self.prompt_time: PromptTime | None = None
        self._num_kv_groups = limits.num_kv_groups
        self._new_block_ids: list[int] = []
        self._decoding_rows: IntArray | None = None
        self._drafts: IntArray | None = None
        self._masks: dict[int, U32Array] = {}
        self._columns = np.empty((5, limits.max_num_seqs), U32)

    def place_decodes(
        self,
        wants: Wants,
        *,
        starts: IntArray,
        grown: IntArray,
        blocks: list[int],
        drafts: IntArray | None = None,
    ) -> None:
        """Adds one token for every request in `wants.decoding`, so many `drafts`, and as many blocks of every
        KV group as each has `grown`. Must be called before anything else is placed.
        """
        assert not self.scheduled
        rows = self._decoding_rows = wants.decoding_rows
        columns = self._columns[:, : len(rows)]
        columns[0], columns[1], columns[2:4], columns[4] = rows, starts, 1, grown
        self.scheduled += wants.decoding
        self.sampled += wants.decoding
        self._new_block_ids += blocks
        self.budget -= len(rows)
        self.work.num_decodes += len(rows)
        self.work.decode_context += int(np.add.reduce(starts))
        if drafts is not None:
            self._drafts = drafts
            num_drafts = int(drafts.sum())
            self.budget -= num_drafts
            self.work.num_decodes += num_drafts
            self.work.decode_context += int(starts @ drafts)

    def limit_prompts(self, times: StepTimes, target: float, smallest: int) -> None:
        """From here on, limits prompt tokens so that the step takes about `target` seconds at most."""
        self.prompt_time = PromptTime(times, self.work, target, smallest)

    @property
    def is_short(self) -> bool:
        """Whether the time target left out prompt tokens."""
        return self.prompt_time is not None and self.prompt_time.is_short

    def fit(self, request: Request, start: int, count: int) -> int:
        """How many of `count` tokens, from `start`, fit into the step's time and the result record."""
        if self.prompt_time is not None and count > 1:
            count = self.prompt_time.fit(start, count)
        if request.sampling.prompt_logprobs >= 0 and start < request.num_prompt_tokens:
            count = min(count, self.num_prompt_logprobs)
        if request.is_pooling and not self.num_pooled and start + count == request.num_prompt_tokens:
            count -= 1
        return count

    def place(self, request: Request, *, start: int, count: int, samples: bool, blocks: list[int]) -> None:
        """Adds `count` tokens of one request, and the blocks that the worker appends to its block table."""
        if request.sampling.prompt_logprobs >= 0 and start < request.num_prompt_tokens:
            self.num_prompt_logprobs -= count
        if request.is_pooling and start + count == request.num_prompt_tokens:
            self.num_pooled -= 1
        if samples and request.constraint is not None:
            assert request.mask is not None
            self._masks[len(self.scheduled)] = request.mask
        self._columns[:, len(self.scheduled)] = (
            request.row,
            start,
            count,
            samples,
            len(blocks) // self._num_kv_groups,
        )
        self.scheduled.append(request)
        if samples:
            self.sampled.append(request)
        self._new_block_ids += blocks
        self.budget -= count
        self.work.add(start, count)
        if self.prompt_time is not None and count > 1:
            self.prompt_time.spend(start, count)

    @property
    def sampled_drafts(self) -> IntArray | None:
        """The most drafts of each sampled request; None if there are none."""
        return self._padded_drafts(len(self.sampled))

    def _padded_drafts(self, length: int) -> IntArray | None:
        """The drafts of the first requests, which decode, and none for the others."""
        if self._drafts is None:
            return None
        padded = np.zeros(length, np.int64)
        padded[: len(self._drafts)] = self._drafts
        return padded

    @property
    def sampled_rows(self) -> IntArray:
        """The rows of the sampled requests."""
        if self._decoding_rows is not None and len(self._decoding_rows) == len(self.sampled):
            return self._decoding_rows
        return np.array([request.row for request in self.sampled], np.int64)

    @property
    def scheduled_rows(self) -> IntArray:
        """The rows of the scheduled requests."""
        return self._columns[0, : len(self.scheduled)].astype(np.int64)

    def _new_blocks_by_group(self) -> U32Array:
        new = u32(self._new_block_ids)
        return new if self._num_kv_groups == 1 else new.reshape(-1, self._num_kv_groups).T.reshape(-1)

    def plan(self, step_id: int, freed_rows: list[int]) -> StepPlan:
        """Makes the plan from what was placed."""
        rows, starts, counts, samples, num_new_blocks = self._columns[:, : len(self.scheduled)]
        drafts = self._padded_drafts(len(rows))
        return StepPlan(
            step_id=step_id,
            freed_rows=u32(freed_rows),
            new_requests=self.new_requests,
            rows=rows,
            starts=starts,
            counts=counts,
            samples=samples,
            num_new_blocks=num_new_blocks,
            new_block_ids=self._new_blocks_by_group(),
            masks=self._masks,
            copied_blocks=np.array(self.copied_blocks, U32) if self.copied_blocks else NO_COPIES,
            num_kv_groups=self._num_kv_groups,
            drafts=None if drafts is None else drafts.astype(U32),
        )
