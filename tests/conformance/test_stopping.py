"""When an answer ends, and what of its end is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.conformance.target import Target

COUNT: Mapping[str, Any] = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8,", "max_tokens": 16}
QUESTION: Mapping[str, Any] = {"messages": [{"role": "user", "content": "Name the capital of France."}]}


@pytest.fixture(scope="module")
def answer(target: Target) -> Any:
    """An answer that the model ends by itself."""
    reply = target.reply(**QUESTION, max_tokens=40, return_token_ids=True)
    assert reply.finish_reason == "stop"
    return reply


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_a_chat_is_kept(target: Target, limit: str) -> None:
    completion = target.chat(**QUESTION, **{limit: 3})
    assert completion.usage.completion_tokens == 3
    assert completion.choices[0].finish_reason == "length"


def test_the_limit_of_a_completion_is_kept(target: Target) -> None:
    completion = target.completion(prompt="Once upon a time", max_tokens=5)
    assert completion.usage.completion_tokens == 5
    assert completion.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(target: Target) -> None:
    whole = target.choice(**COUNT)
    assert " 11" in whole.text
    for stop in (" 11", ["no such thing", " 11"]):
        stopped = target.choice(**COUNT, stop=stop)
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole.text[: whole.text.index(" 11")]


def test_a_stop_string_over_several_tokens_is_found(target: Target) -> None:
    stopped = target.choice(**COUNT, stop="0, 11, 1")
    assert stopped.text.strip() == "9, 1"


@pytest.mark.extension
def test_a_stop_string_is_left_if_asked_for(target: Target) -> None:
    stopped = target.choice(**COUNT, stop=" 11", include_stop_str_in_output=True)
    assert stopped.text.endswith(" 11")
    assert stopped.finish_reason == "stop"


@pytest.mark.extension
def test_a_stop_token_ends_the_text(target: Target) -> None:
    whole = target.choice(**COUNT, return_token_ids=True)
    [comma] = target.tokens(",")
    stopped = target.choice(**COUNT, stop_token_ids=[comma], return_token_ids=True)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(comma) + 1]
    assert "," not in stopped.text
    shown = target.choice(**COUNT, stop_token_ids=[comma], include_stop_str_in_output=True)
    assert shown.text == stopped.text + ","


@pytest.mark.extension
def test_min_tokens_delays_the_end(target: Target, answer: Any) -> None:
    length, end = len(answer.token_ids), answer.token_ids[-1]
    later = target.reply(**QUESTION, max_tokens=length + 6, min_tokens=length + 3, return_token_ids=True)
    assert len(later.token_ids) >= length + 3
    assert later.token_ids[: length - 1] == answer.token_ids[:-1]
    assert end not in later.token_ids[: length + 2]


@pytest.mark.extension
def test_min_tokens_delays_a_stop_token(target: Target) -> None:
    [comma] = target.tokens(",")
    asked = {**COUNT, "stop_token_ids": [comma], "return_token_ids": True}
    early = target.choice(**asked)
    late = target.choice(**asked, min_tokens=len(early.token_ids) + 2)
    assert len(late.token_ids) >= len(early.token_ids) + 2


@pytest.mark.extension
def test_ignore_eos_goes_past_the_end(target: Target, answer: Any) -> None:
    length = len(answer.token_ids)
    past = target.reply(**QUESTION, max_tokens=length + 4, ignore_eos=True, return_token_ids=True)
    assert past.token_ids[:length] == answer.token_ids
    assert past.finish_reason == "length"
    assert len(past.token_ids) == length + 4


@pytest.mark.extension
def test_special_tokens_are_shown_if_asked_for(target: Target, answer: Any) -> None:
    asked = {**QUESTION, "max_tokens": len(answer.token_ids) + 1, "ignore_eos": True}
    special = target.text(answer.token_ids[-1:])
    assert special not in target.reply(**asked).message.content
    for spaces in (True, False):
        shown = target.reply(**asked, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert special in shown.message.content
