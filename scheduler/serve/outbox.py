"""Events for one subscriber, collected until its stream takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.dispatch.records import PromptLogprobs, TokenLogprobs
from engine.dispatch.sampling import F32Array
from pagewire.base.errors import Code, PagewireError
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.telemetry.context import TraceContext
from scheduler.request import EndReason, Request

END_REASONS = {
    EndReason.STOP: pb.END_REASON_STOP,
    EndReason.LENGTH: pb.END_REASON_LENGTH,
    EndReason.ABORT: pb.END_REASON_ABORT,
    EndReason.ERROR: pb.END_REASON_ERROR,
}


WORKER_LOST = "worker lost"
MAX_EVENTS = 64
"""What happened to a request is told up to so many events; preemptions are counted beyond."""


class TicketEvent(NamedTuple):
    """Something that happened to a request at `time` (perf_counter seconds)."""

    time: float
    name: str
    detail: str


@dataclass(slots=True, eq=False)
class Ticket:
    """The submitter's data about a request; `Request.owner`.

    Attributes:
        outbox: where its events go.
        handle: identifies the request on that stream.
        submitted_at, scheduled_at, first_token_at, last_token_at: perf_counter seconds; 0 until it happens.
        deadline: the timer that ends the request at its deadline.
        received: Unix time at which the frontend got the request; 0 if unknown.
        trace: the request's span, if it is traced.
        events: what else happened to it.
    """

    outbox: Outbox
    handle: int
    submitted_at: float
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    deadline: asyncio.TimerHandle | None = None
    received: float = 0.0
    trace: TraceContext | None = None
    events: list[TicketEvent] = field(default_factory=list)

    def note(self, time: float, name: str, detail: str = "") -> None:
        """Adds an event."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(TicketEvent(time, name, detail))


class Outbox:
    """Events for one stream, in columns. A slow subscriber gets several steps in one message, so the size is
    bounded by the tokens that its requests may still generate.
    """

    def __init__(self) -> None:
        self._handles: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []
        self._prompt_logprobs: list[tuple[int, PromptLogprobs]] = []
        self._pooled_states: list[tuple[int, F32Array]] = []
        self._admitted: list[pb.Admitted] = []
        self._ended: list[pb.Ended] = []
        self._model: pb.GetModelResponse | None = None
        self._cache: pb.CacheChanges | None = None
        self._step_id = 0
        self._wake = asyncio.Event()
        self.is_closed = False

    def close(self) -> None:
        """Closes the outbox; a pending `take` returns an empty list."""
        self.is_closed = True
        self._wake.set()

    def add_tokens(
        self, handles: list[int], token_ids: list[int], logprobs: list[tuple[int, TokenLogprobs]]
    ) -> None:
        """Adds one sampled token per handle.

        Args:
            handles: the requests' handles.
            token_ids: the tokens.
            logprobs: (index into both, the token's log probabilities).
        """
        begin = len(self._handles)
        self._logprobs += [(begin + index, entry) for index, entry in logprobs]
        self._handles += handles
        self._token_ids += token_ids

    def add_prompt_logprobs(self, handle: int, entry: PromptLogprobs) -> None:
        """Adds prompt logprobs of some tokens of a request's prompt."""
        self._prompt_logprobs.append((handle, entry))

    def add_pooled_state(self, handle: int, state: F32Array) -> None:
        """Adds the pooled state of a request."""
        self._pooled_states.append((handle, state))

    def add_admitted(self, handle: int, num_cached_tokens: int) -> None:
        """Adds that a request was admitted for the first time."""
        self._admitted.append(pb.Admitted(handle=handle, num_cached_tokens=num_cached_tokens))

    def add_ended(
        self,
        handle: int,
        request: Request,
        status: Code = Code.INTERNAL,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Adds that a request ended. `status`, `param` (the field at fault) and `retry_after` (seconds) are
        used only if it ended with an error.
        """
        ended = pb.Ended(
            handle=handle,
            reason=END_REASONS[request.end_reason or EndReason.ABORT],
            stop_token_id=request.stop_token_id,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            num_output_tokens=request.num_output_tokens,
        )
        if request.end_reason is EndReason.ERROR:
            ended.status, ended.error, ended.param = status, request.error, param or ""
            if retry_after is not None:
                ended.retry_after = retry_after
        self._ended.append(ended)

    def add_refused(self, handle: int, error: PagewireError) -> None:
        """Adds that a submission was refused."""
        self._ended.append(
            pb.Ended(
                handle=handle,
                reason=pb.END_REASON_ERROR,
                status=error.code,
                error=error.message,
                param=error.param or "",
                retry_after=error.retry_after,
            )
        )

    def set_model(self, model: pb.GetModelResponse) -> None:
        """Sets the model's facts, which changed, or whether an engine is attached did."""
        self._model = model
        self._wake.set()

    def take_cache(self, changes: Callable[[], pb.CacheChanges]) -> bool:
        """Takes what `changes` makes of the changes of the cache. Returns whether it did: while the last ones
        are still here, they go on being collected.
        """
        if self._cache is not None:
            return False
        self._cache = changes()
        self._wake.set()
        return True

    def flush(self, step_id: int) -> None:
        """Wakes the stream to take what was added."""
        self._step_id = step_id
        self._wake.set()

    async def take(self) -> list[pb.ConnectResponse]:
        """Waits for events and takes them all: at most one message of each kind."""
        await self._wake.wait()
        self._wake.clear()
        if self.is_closed:
            return []
        messages = []
        if self._model is not None:
            messages.append(pb.ConnectResponse(model=self._model))
            self._model = None
        if self._handles or self._admitted or self._ended or self._prompt_logprobs:
            messages.append(self._take_deltas())
        if self._cache is not None:
            messages.append(pb.ConnectResponse(cache=self._cache))
            self._cache = None
        return messages

    def _take_deltas(self) -> pb.ConnectResponse:
        message = pb.ConnectResponse()
        deltas = message.deltas  # filled in place: a message given to a constructor is copied
        deltas.step_id = self._step_id
        deltas.handles.extend(self._handles)
        deltas.token_ids.extend(self._token_ids)
        deltas.admitted.extend(self._admitted)
        deltas.ended.extend(self._ended)
        for index, logprobs in self._logprobs:
            deltas.logprob_indices.append(index)
            deltas.logprobs.append(logprobs_message(logprobs))
        for handle, entry in self._prompt_logprobs:
            _fill_prompt_logprobs(deltas.prompt_logprobs.add(handle=handle, first=entry.first), entry)
        for handle, state in self._pooled_states:
            deltas.pooled_states.add(handle=handle).values.extend(state.tolist())
        self._handles, self._token_ids, self._logprobs = [], [], []
        self._prompt_logprobs, self._pooled_states = [], []
        self._admitted, self._ended = [], []
        return message


def _fill_prompt_logprobs(message: pb.PromptLogprobs, entry: PromptLogprobs) -> None:
    columns = entry.logprobs.tolist(), entry.top_ids.tolist(), entry.top_logprobs.tolist()
    for logprob, top_ids, top_logprobs in zip(*columns, strict=True):
        message.logprobs.add(logprob=logprob, top_ids=top_ids, top_logprobs=top_logprobs)


def logprobs_message(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """Converts log probabilities to a message."""
    return pb.TokenLogprobs(
        logprob=logprobs.logprob, top_ids=list(logprobs.top_ids), top_logprobs=list(logprobs.top_logprobs)
    )


def ticket_of(request: Request) -> Ticket:
    """The ticket of a request, which must have one."""
    assert isinstance(request.owner, Ticket)
    return request.owner


def by_outbox(tickets: list[Ticket]) -> dict[Outbox, Sequence[int]]:
    """Maps each outbox to the indices of its tickets."""
    outboxes = {ticket.outbox for ticket in tickets}
    if len(outboxes) == 1:
        return {outboxes.pop(): range(len(tickets))}
    return {
        outbox: [index for index, ticket in enumerate(tickets) if ticket.outbox is outbox]
        for outbox in outboxes
    }
