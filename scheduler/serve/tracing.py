"""The scheduler's spans of a request: the request, and in it the queue, the prefill and the decode."""

from __future__ import annotations

from typing import Any

from pagewire.telemetry.context import TraceContext
from pagewire.telemetry.spans import Span, SpanEvent, SpanWriter, nanoseconds, wall_offset
from scheduler.request import EndReason, Request
from scheduler.serve.outbox import WORKER_LOST, Ticket


def write_spans(writer: SpanWriter, request: Request, ticket: Ticket, now: float) -> None:
    """Writes the spans of a traced request that ended at `now` (perf_counter seconds)."""
    trace = ticket.trace
    assert trace is not None
    offset = wall_offset()

    def ns(reading: float) -> int:
        return nanoseconds(reading + offset)

    def phase(name: str, start: float, end: float, **attributes: Any) -> None:
        writer.add(Span(name, trace.child(), ns(start), ns(end or now), attributes))

    phase("queue", ticket.submitted_at, ticket.scheduled_at)
    if ticket.scheduled_at:
        cached = max(request.num_cached_tokens, 0)
        phase(
            "prefill",
            ticket.scheduled_at,
            ticket.first_token_at,
            **{"pagewire.cached_tokens": cached, "gen_ai.usage.input_tokens": request.num_prompt_tokens},
        )
    if ticket.first_token_at:
        tokens = {"gen_ai.usage.output_tokens": request.num_output_tokens}
        phase("decode", ticket.first_token_at, ticket.last_token_at, **tokens)
    reason = request.end_reason or EndReason.ABORT
    attributes = {
        "pagewire.request_id": request.request_id,
        "pagewire.cached_tokens": max(request.num_cached_tokens, 0),
        "pagewire.preemptions": request.num_preemptions,
        "pagewire.worker_losses": sum(event.name == WORKER_LOST for event in ticket.events),
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": request.num_output_tokens,
        "gen_ai.response.finish_reasons": [reason.name.lower()],
    }
    events = [
        SpanEvent(name, ns(time), {"pagewire.detail": detail} if detail else {})
        for time, name, detail in ticket.events
    ]
    writer.add(
        Span(
            "scheduler.request",
            trace,
            ns(ticket.submitted_at),
            ns(now),
            attributes,
            events,
            error=request.error if reason is EndReason.ERROR else "",
        )
    )


def trace_id_of(trace: TraceContext | None) -> str | None:
    """The trace's id, for logs."""
    return None if trace is None else trace.trace_id
