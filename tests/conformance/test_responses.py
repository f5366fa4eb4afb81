"""The Responses API: it says what chat completions say."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.conformance.target import Target

QUESTION = "Name the capital of France. Answer in one short sentence."
GREEDY = {"temperature": 0, "max_output_tokens": 12}


def test_a_response_is_the_same_text_as_a_chat_completion(target: Target) -> None:
    response = target.client.responses.create(
        model=target.model, input=QUESTION, instructions="Be polite.", **GREEDY
    )
    turns: list[Any] = [
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": QUESTION},
    ]
    chat = target.client.chat.completions.create(
        model=target.model, messages=turns, temperature=0, max_tokens=12
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason] == response.status


def test_streamed_and_whole_responses_are_equal(target: Target) -> None:
    fields: dict[str, Any] = {
        "model": target.model,
        "input": QUESTION,
        "temperature": 1.0,
        "max_output_tokens": 16,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "extra_body": {"seed": 11, "cache_salt": "responses"},
    }
    whole = target.client.responses.create(**fields).model_dump()
    fields["extra_body"] = {"seed": 11, "cache_salt": "streamed responses"}
    *events, last = target.client.responses.create(**fields, stream=True)
    streamed = last.response.model_dump()
    for each in (whole, streamed):
        for name in ("id", "created_at", "completed_at"):
            del each[name]
        for item in each["output"]:
            del item["id"]
    assert streamed == whole
    text = whole["output"][0]["content"][0]
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta") == text["text"]
    )
    told = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert [one.token for one in told] == [one["token"] for one in text["logprobs"]]


def test_a_response_goes_on_from_the_one_before(target: Target) -> None:
    first = target.client.responses.create(model=target.model, input=QUESTION, **GREEDY)
    more: list[Any] = [
        {"role": "user", "content": QUESTION},
        *first.output,
        {"role": "user", "content": "And Spain?"},
    ]
    second = target.client.responses.create(model=target.model, input=more, **GREEDY)
    assert second.output_text
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + 5


def test_text_format_holds_the_answer_to_a_schema(target: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "city", "schema": schema, "strict": True}}
    response = target.client.responses.create(model=target.model, input=QUESTION, text=form, temperature=0)
    answer = json.loads(response.output_text)
    assert set(answer) == {"city", "large"}
    assert answer["city"] in ("Paris", "Rome")


def test_a_forced_call_is_an_item_with_arguments_of_its_schema(target: Target) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools: list[Any] = [{"type": "function", "name": "weather", "parameters": parameters}]
    question: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice: Any = {"type": "function", "name": "weather"}
    fields = {"model": target.model, "tools": tools, "temperature": 0}
    response = target.client.responses.create(**fields, input=question, tool_choice=choice)
    [call] = response.output
    assert (call.type, call.name, response.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    *_, last = target.client.responses.create(**fields, input=question, tool_choice=choice, stream=True)
    assert last.response.output[0].arguments == call.arguments
    returned = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    answer = target.client.responses.create(
        **fields, input=[*question, call, returned], tool_choice="none", max_output_tokens=16
    )
    assert answer.output_text


def test_a_format_that_cannot_be_kept_is_refused(target: Target) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="strin") as refused:
        target.response(input=QUESTION, text=form)
    if target.directory is not None:
        assert refused.value.param == "text.format.schema"
