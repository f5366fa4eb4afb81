"""The worker's spans and its log of failed steps, from plans and results."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from engine.dispatch.records import NewRequest, StepPlan, StepResult, decode_plan, encode_plan
from engine.dispatch.sampling import SamplingRecord, u32
from engine.worker.requests import OpenRequests
from pagewire.telemetry.context import new_trace
from pagewire.telemetry.spans import Phase, Span, SpanWriter

TRACE = new_trace()


class Spans:
    def __init__(self) -> None:
        self.written: list[Span] = []

    def add(self, span: Span) -> None:
        self.written.append(span)

    @property
    def phases(self) -> list[Phase]:
        return [phase for span in self.written for phase in span.phases]

    def call_between_batches(self, call: Any) -> None:
        self.idle = call


def plan(
    step_id: int, rows: list[int], samples: list[int], new: list[NewRequest] | None = None, freed: Any = ()
) -> StepPlan:
    """As it arrives: through its binary record."""
    ones = u32([1] * len(rows))
    made = StepPlan(
        step_id, u32(list(freed)), new or [], u32(rows), ones, ones, u32(samples), ones * 0, u32([])
    )
    return decode_plan(encode_plan(made))


def new(row: int, trace: bytes = TRACE.to_bytes()) -> NewRequest:
    sampling = SamplingRecord()
    return NewRequest(row, u32([1, 2]), 2, u32([0]), sampling, request_id=f"r{row}", trace=trace)


def result(step_id: int, error: str = "") -> StepResult:
    return StepResult(step_id, u32([]), error=error)


def test_a_prefill_of_two_steps_and_a_decode_are_spans_of_the_requests_trace() -> None:
    spans = Spans()
    requests = OpenRequests(cast(SpanWriter, spans))
    steps = [plan(0, [3], [0], [new(3)]), plan(1, [3], [1]), plan(2, [3], [1]), plan(3, [], [], freed=[3])]
    for step in steps:
        requests.planned(step)
        requests.finished(result(step.step_id))
    prefill, decode = spans.phases
    assert (prefill[0], decode[0]) == ("worker.prefill", "worker.decode")
    assert prefill[3] == {"pagewire.tokens": 2, "pagewire.steps": 2}
    assert decode[3] == {"pagewire.steps": 1}
    assert {span.context.to_bytes() for span in spans.written} == {TRACE.to_bytes()}
    assert prefill[1] <= prefill[2] == decode[1] <= decode[2]


def test_a_decode_is_written_once_though_no_plan_frees_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.worker.requests._IDLE_SECONDS", 0)
    spans = Spans()
    requests = OpenRequests(cast(SpanWriter, spans))
    requests.planned(plan(0, [3], [1], [new(3)]))
    spans.idle()
    assert spans.written == []  # its step is under way
    requests.finished(result(0))
    spans.idle()
    spans.idle()
    requests.planned(plan(1, [], [], freed=[3]))
    assert [name for name, *_ in spans.phases] == ["worker.prefill", "worker.decode"]


def test_requests_without_a_trace_have_no_spans() -> None:
    spans = Spans()
    requests = OpenRequests(cast(SpanWriter, spans))
    requests.planned(plan(0, [3], [1], [new(3, trace=b"")]))
    requests.finished(result(0))
    requests.reset()
    assert spans.written == []


def test_a_step_that_fails_is_logged_with_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    requests = OpenRequests(None)
    requests.planned(plan(7, [3, 5], [1, 1], [new(3), new(5, trace=b"")]))
    with caplog.at_level(logging.ERROR):
        requests.finished(result(7, "CUDA error"))
    (entry,) = caplog.records
    assert "CUDA error" in entry.getMessage()
    assert vars(entry)["fields"] == {"step": 7, "request_ids": ["r3", "r5"], "trace_ids": []}
