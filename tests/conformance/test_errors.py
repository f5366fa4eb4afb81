"""What is refused, how it is said, and which field it is said of."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conformance.target import Target

MESSAGES = [{"role": "user", "content": "Hi"}]

WRONG: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("max_tokens", -3),
    ("max_tokens", 2.5),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.1),
    ("logit_bias", {"3": 101}),
    ("logit_bias", {"a": 1}),
    ("seed", "x"),
    ("stop", 5),
    ("stream_options", {"include_usage": True}),
]
EXTENSION: list[tuple[str, Any]] = [
    ("top_k", -2),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("min_tokens", -1),
    ("best_of", 0),
    ("prompt_logprobs", 21),
    ("stop_token_ids", [1, "x"]),
    ("allowed_token_ids", [10_000_000]),
    ("allowed_token_ids", [-1]),
    ("bad_words", "word"),
    ("truncate_prompt_tokens", 0),
    ("priority", "high"),
    ("ignore_eos", "yes"),
    ("use_beam_search", 1),
    ("cache_salt", 5),
    ("return_token_ids", "yes"),
    ("structured_outputs", {"regex": 5}),
    ("request_id", "a" * 2000),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [*WRONG, *(pytest.param(*each, marks=pytest.mark.extension) for each in EXTENSION)],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_wrong_value_is_refused_by_its_name(target: Target, path: str, name: str, value: Any) -> None:
    body = {"prompt": "Hi"} if path == "completions" else {"messages": MESSAGES}
    answer = target.http.post(f"/v1/{path}", json={"model": target.model, **body, name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert name in error["message"]
    if target.directory is not None:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"].partition("[")[0].partition(".")[0] == name


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(target: Target, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        target.client.chat.completions.create(model="no-such-model", messages=MESSAGES, stream=stream)
    if target.directory is not None:
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.extension
def test_unknown_fields_are_refused_wherever_they_are(target: Target, model_directory: Any) -> None:
    for fields, param in (
        ({"foo": 1}, "foo"),
        ({"stream": True, "stream_options": {"bar": 1}}, "stream_options.bar"),
        ({"messages": [{**MESSAGES[0], "baz": 1}]}, "messages[0].baz"),
    ):
        with pytest.raises(openai.BadRequestError, match="Unrecognized") as refused:
            target.chat(**{"messages": MESSAGES, **fields})
        assert refused.value.param == param


def test_messages_are_needed(target: Target) -> None:
    for messages in ([], [{"role": "user"}], [{"role": "wizard", "content": "x"}]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            target.chat(messages=messages)


def test_what_does_not_fit_is_refused(target: Target) -> None:
    with pytest.raises(openai.BadRequestError):
        target.completion(prompt=[1] * 200_000, max_tokens=1)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"prompt": "\xff"}'], ids=repr)
def test_bodies_that_are_no_json_objects_are_refused(target: Target, data: bytes) -> None:
    answer = target.http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods_say_so(target: Target) -> None:
    assert target.http.get("/v1/no-such-thing").status_code == 404
    assert target.http.get("/v1/completions").status_code == 405
