"""One request as the frontend keeps it between the scheduler's stream and the client's."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pagewire.base.errors import PagewireError
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.telemetry.context import CURRENT_REQUEST

MAX_UNREAD_LOGPROBS = 8192
"""How many positions with log probabilities wait for a client that reads too slowly. (Bare token ids are
bounded by the model's context and need no limit of their own.)"""


class Wakeup:
    """Wakes the one consumer of some open requests when any of them has news. There is news at first, so that
    the consumer looks at them once in any case.

    Attributes:
        news: whether something came since the consumer last looked. Whoever sets it calls `tell` when all
            that came together is there.
    """

    __slots__ = ("_take", "_waiter", "news")

    def __init__(self) -> None:
        self.news = True
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[], bool] | None = None

    def tell(self) -> None:
        """Lets the consumer know of the news. Never raises: what its own code raises, it gets."""
        waiter = self._waiter
        if not self.news or waiter is None or waiter.done():
            return
        if self._take is not None:
            try:
                if self._take():
                    self.news = False
                    return
            except Exception as error:
                waiter.set_exception(error)
                return
        waiter.set_result(None)

    async def wait(self, take: Callable[[], bool] | None = None) -> None:
        """Returns once there is news, which the caller is about to take.

        Args:
            take: takes news while the caller waits, where it arises, which saves the switch to the caller's
                task. It says whether the caller can go on waiting. What it raises is raised here.
        """
        if not self.news:
            self._waiter = asyncio.get_running_loop().create_future()
            self._take = take
            try:
                await self._waiter
            finally:
                self._waiter = self._take = None
        self.news = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is asked of the scheduler.

    Attributes:
        request_id: the public id.
        prompt_ids: the prompt's token ids.
        sampling: resolved parameters, `seed` and `max_tokens` set.
        priority: lower goes first.
        client: whose it is, as the scheduler is told; see frontend/caller.py.
        deadline: event loop time at which the request is ended, or None.
        cache_salt: cached prefixes are shared only among requests of the same one.
        bad_words: token sequences that the output may not have.
        pooling: if set, the request ends with a pooled hidden state instead of generating.
        adapter_id: the adapter that computes it; 0 is the base model alone.
        part: its number among what is submitted for one answer; if it is not 0, it ends the request_id, too.
    """

    request_id: str
    prompt_ids: Sequence[int]
    sampling: inference_pb2.SamplingParams
    priority: int = 0
    client: str = ""
    deadline: float | None = None
    cache_salt: str = ""
    bad_words: Sequence[Sequence[int]] = ()
    pooling: inference_pb2.Pooling = inference_pb2.POOLING_UNSPECIFIED
    part: int = 0
    adapter_id: int = 0


class Stream(Protocol):
    """What a request is on: the link to a scheduler."""

    def close(self, request: OpenRequest) -> None:
        """Ends the caller's interest in a request."""


class OpenRequest:
    """A submitted request. The link appends to it and tells its wakeup, one consumer takes from it, both on
    one event loop.

    It holds everything needed to submit the request again to another scheduler: the prompt and every
    token received so far. Tokens that arrive while the consumer is busy simply accumulate, so a slow
    client gets fewer, larger deltas.

    Attributes:
        handle: names the request on the scheduler's stream, and on the next one has another value.
        link: the stream that it is on; None before it is on one.
        submission: what was asked for.
        wakeup: tells the consumer of news; several requests may share it.
        output_ids: every token generated so far.
        prompt_logprobs: of every prompt token but the first, as far as the scheduler has told.
        pooled: the pooled hidden state, once it is there.
        num_cached_tokens: prompt tokens found in the prefix cache, None until admitted.
        admitted_at: `time.perf_counter` when this was first heard of.
        ended: the terminal message; nothing is appended after it is set.
        context: of the call that it is for, if there is one.
        is_complete: whether its text has ended, at a stop string, before the scheduler has ended it.
    """

    __slots__ = (
        "_logprobs",
        "_num_taken",
        "_submitted",
        "admitted_at",
        "context",
        "ended",
        "handle",
        "is_complete",
        "link",
        "num_cached_tokens",
        "output_ids",
        "pooled",
        "prompt_logprobs",
        "submission",
        "timer",
        "wakeup",
    )

    def __init__(self, handle: int, submission: Submission, wakeup: Wakeup) -> None:
        self.handle = handle
        self.link: Stream | None = None
        self.submission = submission
        self.wakeup = wakeup
        self.output_ids: list[int] = []
        self.prompt_logprobs: list[scheduler_pb2.TokenLogprobs] = []
        self.pooled: Sequence[float] | None = None
        self.num_cached_tokens: int | None = None
        self.admitted_at: float | None = None
        self.ended: scheduler_pb2.Ended | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._logprobs: deque[scheduler_pb2.TokenLogprobs] = deque()
        self._submitted = False
        self._num_taken = 0
        self.is_complete = False
        self.context = CURRENT_REQUEST.get()
        if self.context is not None and submission.part == 0:
            self.context.request_id = submission.request_id  # the message may have named it

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.submission.prompt_ids

    def note(self, event: str) -> None:
        """Adds an event to the call's span, if that is traced."""
        if self.context is not None and self.context.trace is not None:
            self.context.events.append((event, time.time()))

    def add_logprobs(self, logprobs: scheduler_pb2.TokenLogprobs) -> bool:
        """Appends the log probabilities of a token; False if more wait for the consumer than may."""
        self._logprobs.append(logprobs)
        return len(self._logprobs) <= MAX_UNREAD_LOGPROBS

    def add_prompt_logprobs(self, entry: scheduler_pb2.PromptLogprobs) -> None:
        """Appends those that are new: a scheduler that took over tells them again from the beginning."""
        num_known = len(self.prompt_logprobs) + 1 - entry.first
        self.prompt_logprobs.extend(entry.logprobs[max(num_known, 0) :])
        self.wakeup.news = True

    def end(self, ended: scheduler_pb2.Ended) -> None:
        """Sets the terminal message. The first one stands."""
        if self.ended is not None:
            return
        self.ended = ended
        if self.timer is not None:
            self.timer.cancel()
        self.wakeup.news = True

    def take(self) -> tuple[list[int], list[scheduler_pb2.TokenLogprobs]]:
        """The tokens that arrived since the last call, and their log probabilities if they were asked for."""
        tokens = self.output_ids[self._num_taken :]
        self._num_taken += len(tokens)
        if not self._logprobs:
            return tokens, []
        logprobs = list(self._logprobs)
        self._logprobs.clear()
        return tokens, logprobs

    def submit_in(self, submit: scheduler_pb2.Submit, now: float) -> None:
        """Fills in the message that starts this request, or continues it after what it has generated already.
        In place: a message that is put into another is copied.
        """
        asked = self.submission
        submit.handle = self.handle
        submit.request_id = asked.request_id
        submit.token_ids.extend(asked.prompt_ids)
        submit.token_ids.extend(self.output_ids)
        submit.num_prompt_tokens = len(asked.prompt_ids)
        submit.sampling.CopyFrom(asked.sampling)
        submit.priority = asked.priority
        submit.resumed = self._submitted
        submit.bad_words.extend(inference_pb2.TokenIds(ids=ids) for ids in asked.bad_words)
        submit.cache_salt = asked.cache_salt
        submit.pooling = asked.pooling
        submit.client = asked.client
        submit.part = asked.part
        submit.adapter_id = asked.adapter_id
        if self.context is not None:
            submit.received = self.context.received
            if self.context.trace is not None:
                submit.traceparent = self.context.trace.traceparent
        self._submitted = True
        if asked.deadline is not None:
            submit.timeout = max(0.0, asked.deadline - now)


def ended_with(error: PagewireError) -> scheduler_pb2.Ended:
    """The terminal message for an error that the frontend itself found."""
    return scheduler_pb2.Ended(
        reason=scheduler_pb2.END_REASON_ERROR,
        status=error.code,
        error=error.message,
        param=error.param or "",
        retry_after=error.retry_after,
    )


def ended_by_drain() -> scheduler_pb2.Ended:
    """The terminal message for a request that was still open when the drain's time was over."""
    return scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_ABORT)
