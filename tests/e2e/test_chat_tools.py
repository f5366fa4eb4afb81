"""Tools, schemas and continued turns through the official openai SDK, against a real server.

The model is far too small to choose tools well: what is shown is that what it must write, it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

MESSAGES = [{"role": "user", "content": "What will the weather be like in Paris, in French degrees?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TIME = {
    "type": "object",
    "properties": {"zone": {"$ref": "#/$defs/zone"}},
    "required": ["zone"],
    "additionalProperties": False,
    "$defs": {"zone": {"enum": ["CET", "UTC"]}},
}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def check(call: Any) -> None:
    assert call.id
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_validate_and_streams_say_the_same(
    server: Any, client: openai.OpenAI, choice: Any
) -> None:
    request = {
        "model": server.model,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    whole = client.chat.completions.create(**request).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    check(call)
    with client.chat.completions.stream(**request) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.message.tool_calls[0].function.name == call.function.name


def test_each_of_n_choices_has_calls_of_its_own(server: Any, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=NAMED,
        n=2,
        seed=5,
        temperature=1.5,
        max_tokens=100,
    )
    calls = [choice.message.tool_calls[0] for choice in completion.choices]
    for call in calls:
        check(call)
    assert len({call.id for call in calls}) == 2
    assert len({call.function.arguments for call in calls}) > 1


def test_a_call_and_its_result_go_back_into_the_conversation(server: Any, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": server.model, "tools": TOOLS, "max_tokens": 100, "temperature": 0}
    asked = client.chat.completions.create(messages=MESSAGES, tool_choice=NAMED, **request)
    message = asked.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    answered = client.chat.completions.create(
        messages=[*MESSAGES, message.model_dump(), result], tool_choice="none", **request
    )
    assert answered.choices[0].message.content
    assert answered.choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_validates_against_its_schema(server: Any, client: openai.OpenAI, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "developer", "content": "Answer in JSON."}, *MESSAGES],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "weather", "strict": True, "schema": WEATHER},
        },
        "temperature": 0,
        "max_tokens": 100,
    }
    if stream:
        chunks = client.chat.completions.create(**request, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        choice = client.chat.completions.create(**request).choices[0]
        assert choice.finish_reason == "stop"
        text = choice.message.content
    jsonschema.validate(json.loads(text), WEATHER)


def test_choices_bound_the_answer(server: Any, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Is Paris in France?"}],
        extra_body={"structured_outputs": {"choice": ["Certainly.", "Never."]}},
    )
    assert completion.choices[0].message.content in ("Certainly.", "Never.")


def test_the_last_turn_is_continued(server: Any, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=server.model,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
            {"role": "assistant", "content": "The capital of France is"},
        ],
        temperature=0,
        max_tokens=4,
        extra_body={"continue_final_message": True},
    )
    assert completion.choices[0].message.content.startswith(" Paris")


def test_what_the_model_cannot_do_is_said(server: Any, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 8}
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        client.chat.completions.create(**request, tools=TOOLS)
    with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template"):
        client.chat.completions.create(**request, extra_body={"chat_template": "{{ messages }}"})
    wrong = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}}
    with pytest.raises(openai.BadRequestError, match="strin"):
        client.chat.completions.create(
            **request, tools=[{"type": "function", "function": wrong}], tool_choice="required"
        )
