"""Spans of traces, and their way out of the process that made them.

A process that serves does no more than to note spans: a thread sends them in batches to a child process
(`pagewire.telemetry.exporter`), where OpenTelemetry's SDK builds and exports them. That takes tens of
microseconds a span, which the event loop does not lose, and spans that were noted survive a process that is
killed. They travel as marshal writes them, which is the cheapest; both ends are the same interpreter.
"""

from __future__ import annotations

import logging
import marshal
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pagewire.base.lifeline import LIFELINE_FD
from pagewire.base.own_packages import python_command, python_path
from pagewire.telemetry.context import TraceContext

logger = logging.getLogger(__name__)

MAX_WAITING = 16_384
"""Spans that wait for the exporting process; beyond it new ones are dropped."""

_BATCH_SECONDS = 0.25
_CLOSE_SECONDS = 5.0


Attributes = dict[str, Any]
"""Strings, numbers, booleans, or lists of them, by name."""

Event = tuple[str, float, Attributes]
"""Something that happened in a span: its name, when (seconds of Unix time), and its attributes."""

Phase = tuple[str, float, float, Attributes]
"""A part of a span that becomes a span below it: its name, start, end (seconds of Unix time), attributes."""


class Span(NamedTuple):
    """A finished span.

    Attributes:
        name: what was done; "" if only its phases are spans, below one that another process writes.
        context: the span's own ids and its parent's.
        start, end: seconds of Unix time.
        attributes: of the span.
        events: what happened meanwhile.
        phases: its parts. The exporting process draws their ids.
        is_server: whether it answers a call of another process (OpenTelemetry's SERVER; else INTERNAL).
        error: why it failed; "" if it did not.
    """

    name: str
    context: TraceContext
    start: float
    end: float
    attributes: Attributes
    events: Sequence[Event] = ()
    phases: Sequence[Phase] = ()
    is_server: bool = False
    error: str = ""


def packed(span: Span) -> tuple[Any, ...]:
    """The span in types that marshal writes."""
    ids = span.context
    return (ids.trace_id, ids.span_id, ids.parent_id, ids.state, span.name, *span[2:])


def unpacked(values: Sequence[Any]) -> Span:
    """The span that a SpanWriter packed."""
    trace_id, span_id, parent_id, state, name, *rest = values
    return Span(name, TraceContext(trace_id, span_id, parent_id, state), *rest)


def wall_offset() -> float:
    """What to add to a reading of `time.perf_counter` to have seconds of Unix time."""
    return time.time() - time.perf_counter()


class SpanWriter:
    """Sends spans to an exporting process of its own. `add` may be called by any thread and never waits.

    Args:
        endpoint: where the spans go, an OTLP endpoint.
        process: the kind of this process, which becomes `service.name`: "pagewire-" and this.
    """

    def __init__(self, endpoint: str, process: str) -> None:
        command = [*python_command("pagewire.telemetry.exporter"), endpoint, f"pagewire-{process}"]
        environment = {**os.environ, **python_path(), "PAGEWIRE_EXPORTED_PID": str(os.getpid())}
        environment.pop(LIFELINE_FD, None)  # the exporter ends with its standard input, after the last spans
        # A session of its own: Ctrl-C and kills are for this process, and the last spans are still exported.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._waiting: deque[Span] = deque()
        self._has_spans = threading.Event()
        self._is_closed = False
        self._is_behind = False
        self._when_idle: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._write_all, name="spans", daemon=True)
        self._thread.start()

    def call_between_batches(self, call: Callable[[], None]) -> None:
        """Has the writing thread call this every _BATCH_SECONDS, too. Set it before spans are added."""
        self._when_idle = call

    def add(self, span: Span) -> None:
        """Sends a span soon; drops it if too many wait, or the writer is closed."""
        if self._is_closed:
            return
        if len(self._waiting) >= MAX_WAITING:
            if not self._is_behind:
                self._is_behind = True
                logger.warning("the exporter of spans is too slow or gone: spans are dropped")
            return
        self._waiting.append(span)
        if not self._has_spans.is_set():
            self._has_spans.set()

    def close(self) -> None:
        """Sends what waits, and lets the exporting process export it and end."""
        self._is_closed = True
        self._has_spans.set()
        self._thread.join(_CLOSE_SECONDS)

    def _write_all(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while not (self._is_closed and not self._waiting):
                self._has_spans.wait(None if self._when_idle is None else _BATCH_SECONDS)
                if not self._is_closed:
                    time.sleep(_BATCH_SECONDS)
                    if self._when_idle is not None:
                        self._when_idle()
                self._has_spans.clear()
                batch = [packed(self._waiting.popleft()) for _ in range(len(self._waiting))]
                if batch:
                    pipe.write(marshal.dumps(batch))
                    pipe.flush()
                    self._is_behind = False
            pipe.close()
        except OSError as error:
            logger.warning("the exporter of spans is gone, no spans are sent any more: %s", error)
            self._is_closed = True
            self._waiting.clear()


def span_writer(endpoint: str | None, process: str) -> SpanWriter | None:
    """A writer if there is an endpoint, else None: tracing is off."""
    return None if endpoint is None else SpanWriter(endpoint, process)
