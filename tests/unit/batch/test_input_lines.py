"""Lines of requests and of data sets, right and wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagewire.base.errors import ConfigError
from pagewire.batch.dataset import read_sample
from pagewire.batch.lines import Line, read_lines
from pagewire.batch.openai_lines import OPENING, BatchReader, answered, id_of, refused

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def line_of(value: Any, number: int = 7) -> Line:
    return Line(number, value if isinstance(value, bytes) else json.dumps(value).encode())


def test_lines_have_the_numbers_of_an_editor_and_blank_ones_none(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"a\r\n\n  \nb")
    assert list(read_lines(path)) == [Line(1, b"a"), Line(4, b"b")]
    with pytest.raises(ConfigError, match="No such file"):
        list(read_lines(tmp_path / "other"))


def test_a_request_keeps_its_name_and_has_the_same_id_in_every_run() -> None:
    request, again = (BatchReader("m").read(line_of(GOOD)) for _ in range(2))
    assert (request.custom_id, request.url, request.error) == ("a", "/v1/completions", None)
    assert request.body == {"model": "m", "prompt": "x"}
    output = answered(request, 200, "r", {"text": "é"})
    assert output.startswith(OPENING)
    assert id_of(output) == request.id == again.id != BatchReader("m").read(line_of(GOOD, 8)).id
    assert json.loads(output) == {
        "id": request.id,
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": {"text": "é"}},
        "error": None,
    }


def test_a_body_that_names_its_model_keeps_it() -> None:
    request = BatchReader("m").read(line_of({**GOOD, "body": {"model": "other"}}))
    assert request.body == {"model": "other"}


@pytest.mark.parametrize(
    ("content", "custom_id", "said"),
    [
        (b'{"custom_id": "a"', None, "line 7 is not JSON: Expecting ',' delimiter at column 18"),
        (b"\xff", None, "line 7 is not JSON: it is not UTF-8"),
        (b"[" * 100_000, None, "line 7 is not JSON"),
        ([1], None, "line 7 is JSON, but not an object"),
        ({**GOOD, "custom_id": None}, None, "line 7 has no custom_id"),
        ({**GOOD, "custom_id": "taken"}, "taken", "custom_id 'taken' is that of line 1"),
        ({**GOOD, "method": "GET"}, "a", "method is 'GET'; it must be 'POST'"),
        ({**GOOD, "url": "/v1/images"}, "a", "url is '/v1/images'; it must be one of /v1/chat/completions"),
        ({**GOOD, "body": "x"}, "a", "body is missing or no object"),
        ({**GOOD, "body": {"stream": True}}, "a", "body.stream is set"),
        ({**GOOD, "custom_id": "\ud800", "url": 1}, "\ud800", "url is 1"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_in_its_answer(content: Any, custom_id: str, said: str) -> None:
    reader = BatchReader(None)
    reader.read(line_of({**GOOD, "custom_id": "taken"}, 1))
    output = json.loads(refused(reader.read(line_of(content))))
    assert (output["custom_id"], output["response"]) == (custom_id, None)
    assert said in output["error"]["message"]


SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    ("fields", "messages", "labels"),
    [
        ({"query": "Hi"}, [USER], None),
        ({"query": "Hi", "response": "Hello.", "system": "Be kind."}, [SYSTEM, USER], "Hello."),
        ({"query": "Hi", "history": [["Hi", "Hello."]]}, [USER, REPLY, USER], None),
        ({"messages": [SYSTEM, USER, REPLY]}, [SYSTEM, USER], "Hello."),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER], None),
    ],
)
def test_both_forms_of_a_data_set_are_the_same_turns(fields: Any, messages: Any, labels: str | None) -> None:
    sample = read_sample(line_of(fields), None)
    assert (sample.messages, sample.labels, sample.error) == (messages, labels, None)
    result = json.loads(sample.result("Hey."))
    assert (result["response"], result["labels"]) == ("Hey.", labels)
    if "query" in fields:
        assert (result["query"], result["history"]) == ("Hi", fields.get("history", []))
    else:
        assert result["messages"] == [*messages, {"role": "assistant", "content": "Hey."}]
    assert sample.has_result(result)
    assert not sample.has_result({**result, "labels": "other"})


def test_the_commands_system_turn_is_for_lines_that_have_none() -> None:
    for fields in ({"query": "Hi"}, {"messages": [USER]}):
        assert read_sample(line_of(fields), "Be kind.").messages == [SYSTEM, USER]
    assert read_sample(line_of({"messages": [SYSTEM, USER]}), "Be rude.").messages == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": "Hi"}, 'line 7 is no request: it must have "query"'),
        ({"query": 1}, "line 7 has no query"),
        ({"query": "Hi", "history": ["Hi"]}, r"history is not a list of [query, response] pairs"),
        ({"query": "Hi", "system": 1}, "line 7: system is 1; it must be a text"),
        ({"query": "Hi", "response": 1}, "line 7: response is 1; it must be a text"),
        ({"messages": "Hi"}, "line 7: messages is no list"),
        ({"messages": [REPLY]}, "line 7: messages has no turn to answer"),
    ],
)
def test_what_is_wrong_with_a_sample_is_named(fields: Any, said: str) -> None:
    assert said in (read_sample(line_of(fields), None).error or "")
