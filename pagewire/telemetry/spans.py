"""Spans of traces, and their way out of the process that made them.

A process that serves does no more than to note spans: a thread sends them in batches to a child process
(`pagewire.telemetry.exporter`), where OpenTelemetry's SDK builds and exports them. So encoding spans takes no
time from the event loop, and spans that were noted survive a process that is killed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pagewire.base.lifeline import LIFELINE_FD
from pagewire.base.own_packages import python_command, python_path
from pagewire.telemetry.context import TraceContext

logger = logging.getLogger(__name__)

MAX_WAITING = 16_384
"""Spans that wait for the exporting process; beyond it new ones are dropped."""

_BATCH_SECONDS = 0.25
_CLOSE_SECONDS = 5.0


class SpanEvent(NamedTuple):
    """Something that happened in a span at `time` (nanoseconds of Unix time)."""

    name: str
    time: int
    attributes: Mapping[str, Any]


class Span(NamedTuple):
    """A finished span.

    Attributes:
        name: what was done.
        context: the span's own ids and its parent's.
        start, end: nanoseconds of Unix time.
        attributes: strings, numbers, booleans, or lists of them.
        events: what happened meanwhile.
        is_server: whether it answers a call of another process (OpenTelemetry's SERVER; else INTERNAL).
        error: why it failed; "" if it did not.
    """

    name: str
    context: TraceContext
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: Sequence[SpanEvent] = ()
    is_server: bool = False
    error: str = ""

    def to_json(self) -> list[Any]:
        """The form in which it is sent to the exporting process; see `from_json`."""
        ids = self.context
        names = (ids.trace_id, ids.span_id, ids.parent_id, ids.state)
        return [self.name, names, self.start, self.end, self.attributes, self.events, *self[6:]]


def from_json(values: Sequence[Any]) -> Span:
    """The span in a list that `Span.to_json` made."""
    name, ids, start, end, attributes, events, is_server, error = values
    told = [SpanEvent(*event) for event in events]
    return Span(name, TraceContext(*ids), start, end, attributes, told, is_server, error)


def wall_offset() -> float:
    """What to add to a reading of `time.perf_counter` to have seconds of Unix time."""
    return time.time() - time.perf_counter()


def nanoseconds(unix: float) -> int:
    """Seconds of Unix time as spans have them."""
    return int(unix * 1e9)


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
        """Sends a span soon; drops it if too many wait."""
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
                batch = [self._waiting.popleft().to_json() for _ in range(len(self._waiting))]
                if batch:
                    pipe.write(json.dumps(batch).encode() + b"\n")
                    pipe.flush()
                    self._is_behind = False
            pipe.close()
        except OSError as error:
            logger.warning("the exporter of spans is gone, no spans are sent any more: %s", error)
            self._is_behind = True


def span_writer(endpoint: str | None, process: str) -> SpanWriter | None:
    """A writer if there is an endpoint, else None: tracing is off."""
    return None if endpoint is None else SpanWriter(endpoint, process)
