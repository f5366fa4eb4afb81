"""The way of spans out of a process: through the exporting process to an OTLP receiver."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pagewire.base.errors import ConfigError
from pagewire.base.observed import check_observed, otlp_protocol
from pagewire.telemetry.context import TraceContext
from pagewire.telemetry.spans import Span, SpanWriter
from tests.otlp_receiver import OtlpReceiver, receiving

CONTEXT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7", "v=1")
SPAN = Span(
    "work",
    CONTEXT,
    1.0,
    3.0,
    {"text": "x", "number": 3, "list": ["stop"]},
    [("worker lost", 2.0, {"detail": "killed"})],
    [("part", 1.5, 2.5, {"count": 2})],
    is_server=True,
    error="it failed",
)


def export(receiver: OtlpReceiver, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    writer = SpanWriter(endpoint, "test")
    try:
        writer.add(SPAN)
    finally:
        writer.close()
    part, span = sorted(
        receiver.trace(CONTEXT.trace_id, lambda spans: len(spans) == 2), key=lambda span: span.name
    )
    assert (part.name, part.parent_id, part.start, part.end) == ("part", CONTEXT.span_id, 1.5, 2.5)
    assert part.attributes == {"count": 2}
    assert (span.service, span.name, span.span_id) == ("pagewire-test", "work", CONTEXT.span_id)
    assert (span.parent_id, span.state) == (CONTEXT.parent_id, "v=1")
    assert (span.start, span.end, span.failed) == (1.0, 3.0, True)
    assert span.attributes["number"] == 3
    assert span.events == {"worker lost": {"detail": "killed"}}


def test_spans_are_exported_by_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        export(receiver, receiver.grpc_endpoint, monkeypatch)


def test_a_path_in_the_endpoint_means_http() -> None:
    assert otlp_protocol("http://localhost:4318/v1/traces") == "http/protobuf"
    assert otlp_protocol("http://localhost:4317") == otlp_protocol("https://collector:4317/") == "grpc"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="it must be a URL such as"):
        check_observed(SimpleNamespace(log_format="text", otlp_traces_endpoint=endpoint))


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire.base.observed.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pagewire\[otel\]'"):
        check_observed(SimpleNamespace(log_format="text", otlp_traces_endpoint="http://localhost:4317"))


def test_another_log_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of text, json"):
        check_observed(SimpleNamespace(log_format="xml", otlp_traces_endpoint=None))
