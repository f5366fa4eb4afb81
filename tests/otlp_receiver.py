"""A small OTLP receiver, over gRPC and HTTP: keeps the spans that come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest

pytest.importorskip("opentelemetry.proto", reason="needs pagewire[otel]")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

SECONDS = 30.0


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a back end sees it. `start` and `end` are in seconds."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    kind: int
    failed: bool
    state: str


class OtlpReceiver:
    """Attributes:
    http_endpoint, grpc_endpoint: what exporters are told.
    """

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def take(self, request: pb.ExportTraceServiceRequest) -> None:
        received = [
            _received(_attributes(each.resource.attributes)["service.name"], span)
            for each in request.resource_spans
            for scope in each.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self._spans += received
            self._changed.notify_all()

    @property
    def spans(self) -> list[ReceivedSpan]:
        with self._changed:
            return list(self._spans)

    def trace(self, trace_id: str, until: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """The spans of a trace, once they are as they should be."""
        deadline = time.monotonic() + SECONDS
        with self._changed:
            while True:
                found = [span for span in self._spans if span.trace_id == trace_id]
                if until(found):
                    return found
                left = deadline - time.monotonic()
                assert left > 0, f"after {SECONDS} s there are only {[span.name for span in found]}"
                self._changed.wait(left)


def _received(service: str, span: trace_pb2.Span) -> ReceivedSpan:
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span.attributes),
        events={event.name: _attributes(event.attributes) for event in span.events},
        kind=span.kind,
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        state=span.trace_state,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def receiving() -> Iterator[OtlpReceiver]:
    """A receiver that listens on both protocols."""
    receiver = OtlpReceiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.take(pb.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
            receiver.take(request)
            return pb.ExportTraceServiceResponse()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    receiver.http_endpoint = f"http://127.0.0.1:{http.server_port}/v1/traces"
    receiver.grpc_endpoint = f"http://127.0.0.1:{port}"
    try:
        yield receiver
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
        server.stop(None).wait()
