"""The process that exports the spans of another one, by OpenTelemetry's SDK and OTLP exporters.

It reads lists of spans from standard input, as a SpanWriter writes them, and ends when that ends. Its
settings other than the endpoint are OpenTelemetry's environment variables: OTEL_EXPORTER_OTLP_HEADERS,
_TIMEOUT, _CERTIFICATE and _COMPRESSION, OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME, OTEL_BSP_SCHEDULE_DELAY
and so on.
"""

from __future__ import annotations

import logging
import marshal
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from pagewire.base.observed import otlp_protocol
from pagewire.base.version import __version__
from pagewire.telemetry.spans import Span, unpacked

SCOPE = InstrumentationScope("pagewire", __version__)
# OpenTelemetry's default of 2048 is less than what one batch of a busy frontend has.
MAX_QUEUE_SIZE = 65_536
# Seconds that the last spans get; the process that made them may be waited for.
LAST_SECONDS = 5.0
NICENESS = 10

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


def exporter_of(endpoint: str) -> SpanExporter:
    """OpenTelemetry's exporter for the endpoint's protocol."""
    if otlp_protocol(endpoint) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http:"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter

    return HttpSpanExporter(endpoint=endpoint)


def readable(span: Span, resource: Resource) -> Iterator[ReadableSpan]:
    """The span and its phases as OpenTelemetry's SDK has them."""
    ids = span.context
    for name, start, end, attributes in span.phases:
        yield _readable(Span(name, ids.child(), start, end, attributes), resource)
    if span.name:
        yield _readable(span, resource)


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    ids = span.context
    trace_id = int(ids.trace_id, 16)
    state = TraceState.from_header([ids.state]) if ids.state else None
    parent = None
    if ids.parent_id:
        parent = SpanContext(trace_id, int(ids.parent_id, 16), span.is_server, _SAMPLED, state)
    return ReadableSpan(
        span.name,
        context=SpanContext(trace_id, int(ids.span_id, 16), False, _SAMPLED, state),
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        events=[Event(name, attributes, _nanoseconds(time)) for name, time, attributes in span.events],
        kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
        start_time=_nanoseconds(span.start),
        end_time=_nanoseconds(max(span.start, span.end)),
        instrumentation_scope=SCOPE,
    )


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def batches(source: BinaryIO) -> Iterator[list[Sequence[Any]]]:
    """What comes until the source ends. What its writer, when it was killed, wrote in part is left out."""
    while True:
        try:
            yield marshal.load(source)  # nosec B302 # from our parent, by its own pipe
        except (EOFError, ValueError, TypeError):
            return


def resource_of(service: str, pid: int) -> Resource:
    """What the spans are of. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before our own values."""
    detected = dict(Resource.create({}).attributes)
    if str(detected["service.name"]).startswith("unknown_service"):
        detected["service.name"] = service
    return Resource({"service.version": __version__, "process.pid": pid, **detected})


def main() -> None:
    """Exports until standard input ends. Ctrl-C and SIGTERM are for the process that made the spans."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)  # serving comes first
    logging.basicConfig(level=logging.ERROR)
    endpoint, service = sys.argv[1:]
    pid = os.environ["PAGEWIRE_EXPORTED_PID"]
    resource = resource_of(service, int(pid))
    queue_size = None if os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE) else MAX_QUEUE_SIZE
    processor = BatchSpanProcessor(exporter_of(endpoint), max_queue_size=queue_size)
    for batch in batches(sys.stdin.buffer):
        for values in batch:
            for span in readable(unpacked(values), resource):
                processor.on_end(span)
    threading.Timer(LAST_SECONDS, os._exit, (1,)).start()
    processor.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
