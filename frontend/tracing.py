"""The frontend's spans of a request: the call that it answers and, in it, tokenizing and detokenizing.

Traces are W3C Trace Context's: a caller's `traceparent` is continued if it is sampled; for a share of the
calls without one a new trace is begun. Without --otlp-traces-endpoint nothing is traced.
"""

from __future__ import annotations

import time

from pagewire.telemetry.context import (
    CURRENT_REQUEST,
    RequestContext,
    TraceContext,
    new_trace,
    read_traceparent,
)
from pagewire.telemetry.spans import Attributes, Event, Span, SpanWriter, wall_offset

_LOW_BITS = 1 << 64


class FrontendTracing:
    """Begins a context for every call, and writes spans if there is a writer.

    Args:
        spans: where spans go; None if nothing is traced.
        sample_ratio: share of the calls without a `traceparent` that are traced, 0 to 1.
    """

    def __init__(self, spans: SpanWriter | None = None, sample_ratio: float = 1.0) -> None:
        self._spans = spans
        # As OpenTelemetry's TraceIdRatioBased: by the trace id, so that all who look at it decide alike.
        self._bound = round(sample_ratio * _LOW_BITS)

    @property
    def is_on(self) -> bool:
        """Whether anything is traced."""
        return self._spans is not None

    def begin(
        self, request_id: str, traceparent: str | None, tracestate: str | None, *, traced: bool = True
    ) -> RequestContext:
        """Makes a call's context, that of the current task from now on.

        Args:
            request_id: the call's id, as far as it is known.
            traceparent, tracestate: the caller's, if it sent some.
            traced: whether the call is of a kind that is worth a span.
        """
        trace = None
        if self._spans is not None and traced:
            trace = self._trace(traceparent, tracestate)
        context = RequestContext(request_id, time.time(), trace)
        CURRENT_REQUEST.set(context)
        return context

    def _trace(self, traceparent: str | None, tracestate: str | None) -> TraceContext | None:
        parent = read_traceparent(traceparent, tracestate)
        if parent is not None:
            return parent.context.child() if parent.sampled else None
        trace = new_trace()
        return trace if int(trace.trace_id, 16) % _LOW_BITS < self._bound else None

    def ended(self, context: RequestContext, name: str, attributes: Attributes, error: str = "") -> None:
        """Writes the span of a call that ended just now, with what is inside it."""
        if self._spans is None or context.trace is None:
            return
        attributes["pagewire.request_id"] = context.request_id
        events: list[Event] = [(event, at, {}) for event, at in context.events]
        self._spans.add(
            Span(
                *(name, context.trace, context.received, time.time(), attributes, events, context.phases),
                is_server=True,
                error=error,
            )
        )

    def answered(
        self,
        outcome: str,
        *,
        began: float,
        submitted_at: float | None,
        first_token_at: float | None,
        num_output_tokens: int,
    ) -> None:
        """Notes the spans inside the current call, which has been answered just now.

        Args:
            outcome: how it ended; see `Admitted.outcome_of`.
            began, submitted_at, first_token_at: `time.perf_counter` when it was let in, when its prompts were
                tokenized and the scheduler was asked, and when its first token was read.
            num_output_tokens: how many tokens were made into text.
        """
        context = CURRENT_REQUEST.get()
        if context is None or context.trace is None:
            return
        offset, now = wall_offset(), time.time()
        tokenized = now if submitted_at is None else submitted_at + offset
        context.phases.append(("tokenize", began + offset, tokenized, {}))
        if first_token_at is not None:
            attributes = {
                "gen_ai.usage.output_tokens": num_output_tokens,
                "gen_ai.response.finish_reasons": [outcome],
            }
            context.phases.append(("detokenize", first_token_at + offset, now, attributes))
