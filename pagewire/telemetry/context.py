"""Which request and which trace a piece of work belongs to.

Trace contexts travel as W3C `traceparent` values (https://www.w3.org/TR/trace-context/): over HTTP in a
header, over gRPC in metadata, to the scheduler in a field of Submit, to the worker in 24 bytes of the plan.
"""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MAX_TRACESTATE = 512
"""Characters of a `tracestate` that are kept; a longer one is dropped, as the specification permits."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACEPARENT_LENGTH = 55
_SAMPLED = 1


class TraceContext(NamedTuple):
    """A span that other spans have as their parent.

    Attributes:
        trace_id: 32 lower-case hexadecimal digits.
        span_id: 16 of them.
        parent_id: the span's own parent; "" if it is the first of its trace.
        state: the caller's `tracestate`; "" if there is none.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    state: str = ""

    def child(self) -> TraceContext:
        """A new span's context, with this one as its parent."""
        return TraceContext(self.trace_id, new_span_id(), self.span_id, self.state)

    @property
    def traceparent(self) -> str:
        """The value of a `traceparent` header."""
        return f"00-{self.trace_id}-{self.span_id}-01"

    def to_bytes(self) -> bytes:
        """Trace id and span id in 24 bytes."""
        return bytes.fromhex(self.trace_id + self.span_id)


def from_bytes(packed: bytes) -> TraceContext | None:
    """The context in 24 bytes, as `to_bytes` makes them; None for no bytes."""
    text = packed.hex()
    return TraceContext(text[:32], text[32:]) if packed else None


def of_traceparent(value: str) -> TraceContext:
    """The context whose `traceparent` this is, checked as far as `to_bytes` does it.

    Raises:
        ValueError: it is none.
    """
    if len(value) != _TRACEPARENT_LENGTH:
        raise ValueError(f"{value!r} is no traceparent")
    return TraceContext(value[3:35], value[36:52])


class RemoteParent(NamedTuple):
    """What a caller's `traceparent` says."""

    context: TraceContext
    sampled: bool


def read_traceparent(value: str | None, state: str | None = None) -> RemoteParent | None:
    """The caller's span. None if there is no `traceparent` or it is malformed: then a new trace begins."""
    match = _TRACEPARENT.fullmatch(value.strip()) if value else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    kept = state.strip() if state and len(state) <= MAX_TRACESTATE else ""
    return RemoteParent(TraceContext(trace_id, span_id, state=kept), bool(int(flags, 16) & _SAMPLED))


def new_trace() -> TraceContext:
    """The first span of a new trace."""
    return TraceContext(f"{random.getrandbits(128) or 1:032x}", new_span_id())


def new_span_id() -> str:
    """Sixteen random hexadecimal digits."""
    return f"{random.getrandbits(64) or 1:016x}"


@dataclass(slots=True)
class RequestContext:
    """The request that a task works on. The frontend's protocols make one for every call.

    Attributes:
        request_id: its public id.
        received: Unix time at which it came.
        trace: the server's span, if the request is traced.
        events: what happened to it, as (name, Unix time); only kept for traced requests.
        phases: the parts of its span that are over: name, start and end in Unix time, attributes.
    """

    request_id: str
    received: float
    trace: TraceContext | None = None
    events: list[tuple[str, float]] = field(default_factory=list)
    phases: list[tuple[str, float, float, dict[str, Any]]] = field(default_factory=list)


CURRENT_REQUEST: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)
"""The request that this task answers. Log records get their ids from here."""
