"""Tools: what a model must call, it calls, with arguments that its schema allows."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.conformance.target import Target

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


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def check(call: Any) -> None:
    assert call.id
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("choice", ["required", named("get_weather")], ids=["required", "named"])
def test_forced_calls_validate(target: Target, choice: Any) -> None:
    reply = target.reply(
        messages=MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=60
    )
    assert reply.finish_reason == "tool_calls"
    assert not reply.message.content
    [call] = reply.message.tool_calls
    check(call)


def test_the_sdks_stream_puts_calls_together(target: Target) -> None:
    asked: Any = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": named("get_time"), "max_tokens": 40}
    with target.client.chat.completions.stream(model=target.model, **asked) as stream:
        kinds = [event.type for event in stream]
        [choice] = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds
    assert choice.finish_reason == "tool_calls"
    check(choice.message.tool_calls[0])


def test_each_of_n_choices_has_calls_of_its_own(target: Target) -> None:
    completion = target.chat(
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=named("get_weather"),
        n=2,
        seed=5,
        temperature=1.5,
        max_tokens=60,
    )
    calls = [choice.message.tool_calls[0] for choice in completion.choices]
    for call in calls:
        check(call)
    assert len({call.id for call in calls}) == 2
    assert len({call.function.arguments for call in calls}) == 2


def test_a_call_and_its_result_go_back_into_the_conversation(target: Target) -> None:
    asked = target.reply(messages=MESSAGES, tools=TOOLS, tool_choice=named("get_time"), max_tokens=40)
    result = {"role": "tool", "tool_call_id": asked.message.tool_calls[0].id, "content": "It is noon."}
    answered = target.reply(
        messages=[*MESSAGES, asked.message.model_dump(), result],
        tools=TOOLS,
        tool_choice="none",
        max_tokens=8,
    )
    assert answered.message.content
    assert not answered.message.tool_calls


def test_tools_that_nobody_may_call_are_not_called(target: Target) -> None:
    plain = target.reply(messages=MESSAGES, max_tokens=8)
    without = target.reply(messages=MESSAGES, max_tokens=8, tools=TOOLS, tool_choice="none")
    assert without.message.content == plain.message.content


def test_a_choice_of_a_tool_that_is_not_there_is_refused(target: Target) -> None:
    with pytest.raises(openai.BadRequestError):
        target.chat(messages=MESSAGES, max_tokens=1, tools=TOOLS, tool_choice=named("get_money"))


@pytest.mark.parametrize("choice", ["required", named("f")], ids=["required", "named"])
def test_arguments_have_no_properties_that_the_schema_does_not_name(target: Target, choice: Any) -> None:
    """As pydantic and MCP servers write schemas: nothing says that there are no other properties."""
    schema = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"]}
    for parameters in (schema, {"type": "object", "properties": {}}):
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        reply = target.reply(
            messages=MESSAGES, tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=40
        )
        assert reply.finish_reason == "tool_calls"
        arguments = json.loads(reply.message.tool_calls[0].function.arguments)
        assert arguments.keys() == parameters["properties"].keys()


def test_any_model_is_told_of_tools_that_it_may_call(target: Target) -> None:
    told = target.chat(messages=MESSAGES, max_tokens=4, tools=TOOLS)
    without = target.chat(messages=MESSAGES, max_tokens=4, tools=TOOLS, tool_choice="none")
    assert told.usage.prompt_tokens > without.usage.prompt_tokens + 50


@pytest.mark.extension
def test_a_tool_whose_schema_cannot_be_enforced_is_named(target: Target, model_directory: Any) -> None:
    wrong = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}}
    with pytest.raises(openai.BadRequestError, match=r"tool 'f' .*strin"):
        target.chat(
            messages=MESSAGES,
            max_tokens=1,
            tools=[{"type": "function", "function": wrong}],
            tool_choice="required",
        )
