"""Which events of a stream are output, what is counted and what is an error."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.openai_events import EventReader, message_of

SEPARATORS = ((", ", ": "), (",", ":"))


def read(
    events: list[Any], *, chat: bool = False, separators: tuple[str, str] = SEPARATORS[0]
) -> tuple[Answer, EventReader]:
    """Events arrive at 1.0, 2.0, ..."""
    answer = Answer(0, 4, 3, sent=0.0)
    reader = EventReader(answer, chat=chat)
    for moment, event in enumerate(events, start=1):
        data = event if isinstance(event, str) else json.dumps(event, separators=separators)
        reader.read([data.encode()], float(moment))
    reader.end(float(len(events) + 1))
    return answer, reader


def text(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}


def said(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    },
}


@pytest.mark.parametrize("separators", SEPARATORS)
def test_a_completion(separators: tuple[str, str]) -> None:
    answer, _ = read(
        [text("a"), text(""), text("c"), text("", "length"), USAGE, "[DONE]"], separators=separators
    )
    assert list(answer.times) == [1.0, 2.0, 3.0]  # half a character is a token too, the closing event is none
    assert (answer.ended, answer.finish_reason, answer.error) == (4.0, "length", "")
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (4, 3, 2)


def test_a_last_token_may_come_with_the_reason() -> None:
    answer, _ = read([text("a"), text("b", "stop"), "[DONE]"])
    assert list(answer.times) == [1.0, 2.0]
    assert (answer.ended, answer.num_outputs, answer.output_tokens) == (2.0, 2, None)


@pytest.mark.parametrize("separators", SEPARATORS)
def test_a_conversation_begins_with_its_first_content(separators: tuple[str, str]) -> None:
    events = [
        said(role="assistant", content=""),
        said(reasoning_content="hm"),
        said(content="a"),
        said(content=""),
        said(tool_calls=[{"index": 0}]),
        said("stop"),
        USAGE,
        "[DONE]",
    ]
    answer, _ = read(events, chat=True, separators=separators)
    assert list(answer.times) == [2.0, 3.0, 5.0]
    assert answer.ended == 6.0


@given(st.text())
def test_no_text_is_taken_for_the_events_own_fields(anything: str) -> None:
    for inside in (anything, '"finish_reason": null', '"finish_reason":null', '"content":""', "\\"):
        answer, _ = read([text("x" + inside, "stop"), "[DONE]"])
        assert (list(answer.times), answer.ended, answer.error) == ([1.0], 1.0, "")
        answer, _ = read([said(content="x" + inside), said("stop"), "[DONE]"], chat=True)
        assert (list(answer.times), answer.ended, answer.error) == ([1.0], 2.0, "")


def test_errors_in_a_stream_are_told() -> None:
    answer, _ = read([text("a"), {"error": {"message": "the engine is gone", "code": 503}}])
    assert answer.error == "stream error: the engine is gone"
    assert not answer.is_complete


def test_a_stream_that_just_ends_is_an_error() -> None:
    answer, _ = read([text("a")])
    assert answer.error == "the stream ended without a finish_reason"


def test_a_stream_that_says_only_that_it_is_done_has_ended_with_its_last_output() -> None:
    answer, _ = read([text("a"), text("b"), "[DONE]"])
    assert answer.is_complete
    assert answer.ended == 2.0


@pytest.mark.parametrize("event", ["{", "[1]", '{"choices": 3}', '{"choices": [3]}', "null"])
def test_what_cannot_be_read_is_an_error(event: str) -> None:
    answer, _ = read([text("a"), event, text("", "stop"), "[DONE]"])
    assert answer.error.startswith("unreadable event")


def test_an_unsent_answer_is_neither_complete_nor_failed() -> None:
    answer = Answer(0, 1, 1)
    assert math.isnan(answer.sent)
    assert not answer.is_complete
    assert not answer.error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "the queue is full"}}', "the queue is full"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": "no"}', "no"),
        (b"<html>\n  502  </html>", "<html> 502 </html>"),
        (b"[1, 2]", "[1, 2]"),
        (b"", ""),
        (b"x" * 300, "x" * 200 + " ..."),
    ],
)
def test_the_message_of_an_error(body: bytes, message: str) -> None:
    assert message_of(body) == message
