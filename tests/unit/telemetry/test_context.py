"""W3C trace contexts (https://www.w3.org/TR/trace-context/, 3.2)."""

from __future__ import annotations

import pytest

from pagewire.telemetry.context import from_bytes, new_trace, read_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_traceparent_is_read_with_its_flag_and_state() -> None:
    parent = read_traceparent(f"00-{TRACE}-{SPAN}-01", "vendor=x")
    assert parent is not None
    assert (parent.context.trace_id, parent.context.span_id, parent.context.state) == (
        TRACE,
        SPAN,
        "vendor=x",
    )
    assert parent.sampled
    unsampled = read_traceparent(f"00-{TRACE}-{SPAN}-00")
    assert unsampled is not None
    assert not unsampled.sampled


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert read_traceparent(f"cc-{TRACE}-{SPAN}-01-what-comes") is not None


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
    ],
)
def test_what_is_no_traceparent_begins_a_new_trace(value: str | None) -> None:
    assert read_traceparent(value) is None


def test_a_child_keeps_the_trace_and_names_its_parent() -> None:
    parent = new_trace()
    child = parent.child()
    assert (child.trace_id, child.parent_id) == (parent.trace_id, parent.span_id)
    assert child.span_id != parent.span_id
    read = read_traceparent(child.traceparent)
    assert read is not None
    assert read.context.span_id == child.span_id


def test_a_context_travels_in_24_bytes() -> None:
    context = new_trace()
    assert len(context.to_bytes()) == 24
    assert from_bytes(context.to_bytes()) == context
    assert from_bytes(b"") is None


def test_a_state_that_is_too_long_is_dropped() -> None:
    parent = read_traceparent(f"00-{TRACE}-{SPAN}-01", "v=" + "x" * 600)
    assert parent is not None
    assert parent.context.state == ""
