"""The requests in a worker's rows: what logs call them, and the worker's spans of those that are traced."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import U32Array
from pagewire.telemetry.context import TraceContext, from_bytes
from pagewire.telemetry.logs import FIELDS
from pagewire.telemetry.spans import Attributes, Phase, Span, SpanWriter

logger = logging.getLogger(__name__)

# A request whose row computed nothing for so long has probably ended.
_IDLE_SECONDS = 1.0


@dataclass(slots=True)
class _Row:
    """A request in a row. Times are seconds of Unix time; 0 until they are known.

    Attributes:
        trace: the span that its spans belong to, if it is traced.
        began: when its first step was launched.
        first_step: how many steps the worker had finished then.
        decode_began: when its first token was there.
        is_written: whether its decode's span is written.
    """

    request_id: str
    num_tokens: int
    trace: TraceContext | None
    began: float
    first_step: int
    decode_began: float = 0.0
    is_written: bool = False


class OpenRequests:
    """Follows plans and results. Per step it does little: it looks at rows only when they change.

    Spans: "worker.prefill", from the launch of a request's first step to its first token, and
    "worker.decode", from there to the last step before it left its row. A request that is preempted, or
    resumed in another worker, has several of each.

    Args:
        spans: where spans go; None if nothing is traced.
    """

    def __init__(self, spans: SpanWriter | None) -> None:
        self._spans = spans
        self._rows: dict[int, _Row] = {}
        self._prefilling: set[int] = set()
        self._in_flight: dict[int, U32Array] = {}
        self._samples: dict[int, list[int]] = {}
        self._num_finished = 0
        self._last_finished = 0.0
        if spans is not None:
            spans.call_between_batches(self._write_idle)

    def planned(self, plan: StepPlan) -> None:
        """Follows a plan that is about to be launched."""
        for row in plan.freed_rows.tolist() if len(plan.freed_rows) else ():
            self._leave(row)
        for request in plan.new_requests:
            self._enter(request)
        self._in_flight[plan.step_id] = plan.rows
        if self._prefilling:
            columns = zip(plan.rows.tolist(), plan.samples.tolist(), strict=True)
            sampled = [row for row, samples in columns if samples and row in self._prefilling]
            if sampled:
                self._samples[plan.step_id] = sampled
                self._prefilling.difference_update(sampled)

    def _enter(self, request: NewRequest) -> None:
        trace = from_bytes(request.trace) if self._spans is not None else None
        self._rows[request.row] = _Row(
            request.request_id,
            len(request.token_ids),
            trace,
            0 if trace is None else time.time(),
            self._num_finished,
        )
        if trace is not None:
            self._prefilling.add(request.row)

    def _leave(self, row: int) -> None:
        entry = self._rows.pop(row, None)
        if entry is not None and entry.trace is not None:
            self._prefilling.discard(row)
            self._write_decode(entry)

    def finished(self, result: StepResult) -> None:
        """Follows a result. Logs a step that failed, with the requests in it."""
        rows = self._in_flight.pop(result.step_id, None)
        if result.error and rows is not None:
            self._log_failure(result, rows.tolist())
        self._num_finished += 1
        if self._spans is None:
            return
        now = self._last_finished = time.time()
        for row in self._samples.pop(result.step_id, ()):
            entry = self._rows.get(row)
            if entry is not None and entry.trace is not None and not entry.decode_began:
                entry.decode_began = now
                attributes: Attributes = {
                    "pagewire.tokens": entry.num_tokens,
                    "pagewire.steps": self._num_finished - entry.first_step,
                }
                entry.first_step = self._num_finished
                _write(self._spans, entry.trace, ("worker.prefill", entry.began, now, attributes))

    def _log_failure(self, result: StepResult, rows: list[int]) -> None:
        entries = [self._rows[row] for row in rows if row in self._rows]
        fields = {
            "step": result.step_id,
            "request_ids": [entry.request_id for entry in entries],
            "trace_ids": [entry.trace.trace_id for entry in entries if entry.trace is not None],
        }
        logger.error("step %d failed: %s", result.step_id, result.error, extra={FIELDS: fields})

    def reset(self) -> None:
        """Forgets all requests: their scheduler is gone."""
        for row in list(self._rows):
            self._leave(row)
        self._in_flight.clear()
        self._samples.clear()

    def _write_idle(self) -> None:
        """Writes the decodes of requests that have ended as far as can be seen. Called by the writing thread:
        the scheduler names rows that are free only when it has something to compute.
        """
        if not self._in_flight and time.time() - self._last_finished > _IDLE_SECONDS:
            for entry in list(self._rows.values()):
                self._write_decode(entry)

    def _write_decode(self, entry: _Row) -> None:
        if self._spans is None or entry.trace is None or entry.is_written or not entry.decode_began:
            return
        entry.is_written = True
        end = max(self._last_finished, entry.decode_began)
        attributes: Attributes = {"pagewire.steps": self._num_finished - entry.first_step}
        _write(self._spans, entry.trace, ("worker.decode", entry.decode_began, end, attributes))


def _write(spans: SpanWriter, trace: TraceContext, phase: Phase) -> None:
    """Writes a span below the request's, which the scheduler writes."""
    spans.add(Span("", trace, 0.0, 0.0, {}, (), (phase,)))
