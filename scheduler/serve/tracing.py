"""The scheduler's spans of a request: the request, and in it the queue, the prefill and the decode."""

from __future__ import annotations

from pagewire.telemetry.context import TraceContext
from pagewire.telemetry.spans import Event, Phase, Span, SpanWriter, wall_offset
from scheduler.request import EndReason, Request
from scheduler.serve.outbox import WORKER_LOST, Ticket


def write_spans(writer: SpanWriter, request: Request, ticket: Ticket, now: float) -> None:
    """Writes the spans of a traced request that ended at `now` (perf_counter seconds)."""
    trace = ticket.trace
    assert trace is not None
    offset = wall_offset()
    ended = now + offset
    num_cached, tokens = max(request.num_cached_tokens, 0), request.num_output_tokens
    submitted, scheduled = ticket.submitted_at + offset, ticket.scheduled_at + offset
    if not ticket.scheduled_at:
        phases: list[Phase] = [("queue", submitted, ended, {})]
    elif not ticket.first_token_at:
        phases = [("queue", submitted, scheduled, {}), ("prefill", scheduled, ended, {})]
    else:
        first, last = ticket.first_token_at + offset, ticket.last_token_at + offset
        phases = [
            ("queue", submitted, scheduled, {}),
            ("prefill", scheduled, first, {"pagewire.cached_tokens": num_cached}),
            ("decode", first, last, {"gen_ai.usage.output_tokens": tokens}),
        ]
    reason = request.end_reason or EndReason.ABORT
    attributes = {
        "pagewire.request_id": request.request_id,
        "pagewire.cached_tokens": num_cached,
        "pagewire.preemptions": request.num_preemptions,
        "pagewire.worker_losses": sum(event.name == WORKER_LOST for event in ticket.events),
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": tokens,
        "gen_ai.response.finish_reasons": [reason.name.lower()],
    }
    events: list[Event] = [
        (name, time + offset, {"pagewire.detail": detail} if detail else {})
        for time, name, detail in ticket.events
    ]
    error = request.error if reason is EndReason.ERROR else ""
    writer.add(Span("scheduler.request", trace, submitted, ended, attributes, events, phases, False, error))


def trace_id_of(trace: TraceContext | None) -> str | None:
    """The trace's id, for logs."""
    return None if trace is None else trace.trace_id
