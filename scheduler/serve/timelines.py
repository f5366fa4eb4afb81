"""What happened to requests: those that are open, and the last ones that ended."""

from __future__ import annotations

from collections import OrderedDict

from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.telemetry.spans import wall_offset
from scheduler.request import Request, Status
from scheduler.serve.outbox import END_REASONS, WORKER_LOST, Ticket, ticket_of

Key = tuple[str, str]


class Timelines:
    """Finds requests by client and public id. The parts of one client's request share the id.

    Memory is bounded: of requests that ended, the last ones are kept, `limit` parts in all.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[Key, dict[int, Request]] = {}
        self._ended: OrderedDict[Key, list[pb.Timeline]] = OrderedDict()
        self._num_ended = 0

    def opened(self, request: Request) -> None:
        """Notes a request that was accepted."""
        if not self._limit:
            return
        key = _key(request)
        if request.part == 0:  # the first part: what ended was another request of the same id
            self._num_ended -= len(self._ended.pop(key, ()))
        self._open.setdefault(key, {})[request.part] = request

    def ended(self, request: Request, now: float) -> None:
        """Keeps what happened to a request that ended at `now` (perf_counter seconds)."""
        key = _key(request)
        parts = self._open.get(key)
        if parts is None or parts.get(request.part) is not request:
            return  # refused before it was accepted, or another one has its id meanwhile
        del parts[request.part]
        if not parts:
            del self._open[key]
        self._ended.setdefault(key, []).append(_timeline(request, ticket_of(request), now))
        self._ended.move_to_end(key)
        self._num_ended += 1
        while self._num_ended > self._limit:
            oldest = next(iter(self._ended.values()))
            oldest.pop(0)
            self._num_ended -= 1
            if not oldest:
                self._ended.popitem(last=False)

    def find(self, client: str, request_id: str) -> list[pb.Timeline]:
        """The parts of a client's request, in order. Of two requests with one id, the later one's. Empty if
        the client has no such request.
        """
        key = (client, request_id)
        parts = {timeline.part: timeline for timeline in self._ended.get(key, ())}
        for part, request in self._open.get(key, {}).items():
            parts[part] = _timeline(request, ticket_of(request), None)
        return [parts[part] for part in sorted(parts)]


def _key(request: Request) -> Key:
    return request.client.partition("/")[0], request.group


def _timeline(request: Request, ticket: Ticket, ended: float | None) -> pb.Timeline:
    """What happened to a request. `ended` is None while it is open."""
    offset = wall_offset()
    message = pb.Timeline(
        part=request.part,
        queued=ticket.submitted_at + offset,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=max(request.num_cached_tokens, 0),
        num_output_tokens=request.num_output_tokens,
        num_preemptions=request.num_preemptions,
        running=request.status is Status.RUNNING,
    )
    if ticket.received:
        message.received = ticket.received
    if ticket.scheduled_at:
        message.scheduled = ticket.scheduled_at + offset
    if ticket.first_token_at:
        message.first_token = ticket.first_token_at + offset
        message.last_token = ticket.last_token_at + offset
    if ended is not None:
        message.ended = ended + offset
        if request.end_reason is not None:
            message.reason = END_REASONS[request.end_reason]
        message.error = request.error
    if ticket.trace is not None:
        message.trace_id = ticket.trace.trace_id
    for time, name, detail in ticket.events:
        message.events.add(time=time + offset, name=name, detail=detail)
        message.num_worker_losses += name == WORKER_LOST
    return message
