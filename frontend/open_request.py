"""One request as the frontend keeps it between the scheduler's stream and the client's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from pagewire.errors import PagewireError
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2

MAX_UNREAD_LOGPROBS = 8192
"""How many positions with log probabilities wait for a client that reads too slowly. (Bare token ids are
bounded by the model's context and need no limit of their own.)"""


class OpenRequest:
    """A submitted request. The link appends to it, one consumer takes from it, both on one event loop.

    It holds everything needed to submit the request again to another scheduler: the prompt and every
    token received so far. Tokens that arrive while the consumer is busy simply accumulate, so a slow
    client gets fewer, larger deltas.

    Attributes:
        handle: names the request on the scheduler's stream.
        request_id: the public id.
        prompt_ids: the prompt's token ids.
        sampling: resolved parameters, `seed` and `max_tokens` set.
        priority: lower goes first.
        deadline: event loop time at which the request is ended, or None.
        output_ids: every token generated so far.
        num_cached_tokens: prompt tokens found in the prefix cache, None until admitted.
        ended: the terminal message; nothing is appended after it is set.
    """

    __slots__ = (
        "_logprobs",
        "_num_taken",
        "_submitted",
        "_waiter",
        "deadline",
        "ended",
        "handle",
        "num_cached_tokens",
        "output_ids",
        "priority",
        "prompt_ids",
        "request_id",
        "sampling",
        "timer",
    )

    def __init__(
        self,
        *,
        handle: int,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: inference_pb2.SamplingParams,
        priority: int,
        deadline: float | None,
    ) -> None:
        self.handle = handle
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.priority = priority
        self.deadline = deadline
        self.output_ids: list[int] = []
        self.num_cached_tokens: int | None = None
        self.ended: scheduler_pb2.Ended | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._logprobs: deque[scheduler_pb2.TokenLogprobs] = deque()
        self._submitted = False
        self._num_taken = 0
        self._waiter: asyncio.Future[None] | None = None

    def add_token(self, token_id: int) -> None:
        """Appends one generated token and wakes the consumer."""
        self.output_ids.append(token_id)
        if self._waiter is not None:
            self._wake()

    def add_logprobs(self, logprobs: scheduler_pb2.TokenLogprobs) -> bool:
        """Appends the log probabilities of a token; False if the consumer is too far behind to take more."""
        self._logprobs.append(logprobs)
        return len(self._logprobs) <= MAX_UNREAD_LOGPROBS

    def end(self, ended: scheduler_pb2.Ended) -> None:
        """Sets the terminal message and wakes the consumer. The first one stands."""
        if self.ended is not None:
            return
        self.ended = ended
        if self.timer is not None:
            self.timer.cancel()
        if self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Returns once there is a token not taken yet, or the end."""
        if self._num_taken < len(self.output_ids) or self.ended is not None:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> tuple[list[int], list[scheduler_pb2.TokenLogprobs]]:
        """The tokens that arrived since the last call, and their log probabilities if they were asked for."""
        tokens = self.output_ids[self._num_taken :]
        self._num_taken += len(tokens)
        logprobs = list(self._logprobs)
        self._logprobs.clear()
        return tokens, logprobs

    def to_submit(self, now: float) -> scheduler_pb2.Submit:
        """The message that starts this request, or continues it after what it has generated already."""
        submit = scheduler_pb2.Submit(
            handle=self.handle,
            request_id=self.request_id,
            token_ids=self.prompt_ids,
            num_prompt_tokens=len(self.prompt_ids),
            sampling=self.sampling,
            priority=self.priority,
            resumed=self._submitted,
        )
        self._submitted = True
        submit.token_ids.extend(self.output_ids)
        if self.deadline is not None:
            submit.timeout = max(0.0, self.deadline - now)
        return submit


def ended_with(error: PagewireError) -> scheduler_pb2.Ended:
    """The terminal message for an error that the frontend itself found."""
    return scheduler_pb2.Ended(
        reason=scheduler_pb2.END_REASON_ERROR, status=int(error.code), error=error.message
    )


def ended_by_drain() -> scheduler_pb2.Ended:
    """The terminal message for a request that was still open when the drain's time was over."""
    return scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_ABORT)
