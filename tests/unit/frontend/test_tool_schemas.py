"""Schemas of tools and formats: no reason to refuse where nothing is enforced, else named or relaxed."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import grpc
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.unit.frontend.conftest import FrontendFactory
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler
from tests.unit.frontend.test_http import frames, post

USER = {"role": "user", "content": "hi"}
HEADER = "X-Pagewire-Relaxed-Schemas"
GOOD = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WILD: dict[str, Any] = {
    "lookahead": {"properties": {"a": {"type": "string", "pattern": "^(?!x)"}}},
    "not": {"properties": {"a": {"not": {}}}},
    "format": {"properties": {"a": {"type": "string", "format": "uint"}}},
    "draft 4": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "id": "x",
        "definitions": {"a": {}},
        "properties": {"a": {"minimum": 1, "exclusiveMinimum": True}, "b": {"$ref": "#/definitions/a"}},
    },
    "draft 3": {"properties": {"a": {"type": "any", "required": True}}},
    "length": {"properties": {"a": {"type": "string", "maxLength": 10**12}}},
    "pattern": {"properties": {"a": {"type": "string", "pattern": "a"}}},
    "cycle": {"properties": {"a": {"$ref": "#/properties/a"}}},
    "reference": {"properties": {"a": {"$ref": "http://example.org/schema"}}},
    "boolean": True,
    "booleans": {"properties": {"a": True, "b": False}},
    "conditions": {"if": {}, "then": {"required": ["a"]}},
    "nothing": {},
    "wrong": {"type": "object", "properties": []},
    "deep": json.loads('{"items":' * 60 + "{}" + "}" * 60),
    "large": {"properties": {f"{number:0300}": {"type": "string"} for number in range(900)}},
}


def function(name: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


async def ask(
    http: aiohttp.ClientSession, path: str = "/v1/chat/completions", **body: Any
) -> tuple[int, Any, str | None]:
    """The status, the answer and what was relaxed."""
    body = body if "input" in body else {"messages": [USER], **body}
    async with http.post(path, json=body) as response:
        answer = await frames(response) if body.get("stream") else await response.json()
        return response.status, answer, response.headers.get(HEADER)


@pytest.mark.parametrize("parser", ["hermes", "generic"])
async def test_no_schema_is_refused_where_nothing_is_enforced(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, parser: str
) -> None:
    scheduler.max_model_len, scheduler.reply = 2**20, b"x"
    frontend = await start_frontend(tool_call_parser=parser)
    async with aiohttp.ClientSession(frontend.url) as http:
        for name, schema in WILD.items():
            tools = [function("good", GOOD), function("wild", schema)]
            status, answer, relaxed = await ask(http, tools=tools, tool_choice="auto", max_tokens=4)
            assert (status, relaxed) == (200, None), (name, answer)
            of_responses = [{**tool.pop("function"), **tool} for tool in tools]
            if schema is not True:  # OpenAI's types for responses have no place for it
                status, answer, _ = await ask(http, "/v1/responses", input="hi", tools=of_responses)
                assert status == 200, (name, answer)


async def test_the_error_names_the_tool_and_the_keyword(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"{}"
    frontend = await start_frontend(tool_call_parser="hermes")
    cases = {
        "lookahead": '"pattern"',
        "not": '"not"',
        "format": "\"format\" 'uint'",
        "conditions": '"if", "then"',
    }
    async with aiohttp.ClientSession(frontend.url) as http:
        for name, keyword in cases.items():
            for strict, choice in (
                (False, "required"),
                (False, {"type": "function", "function": {"name": "wild"}}),
                (True, "auto"),
            ):
                tools = [function("good", GOOD, strict=strict), function("wild", WILD[name], strict=strict)]
                status, answer, _ = await ask(http, tools=tools, tool_choice=choice)
                assert (status, answer["error"]["param"]) == (400, "tools")
                message = answer["error"]["message"]
                assert message.startswith("tool 'wild' cannot be enforced: ")
                assert keyword in message
        tools = [function("wild", WILD["not"]), function("good", GOOD)]
        choice = {"type": "function", "function": {"name": "good"}}
        status, *_ = await ask(http, tools=tools, tool_choice=choice)
        assert status == 200  # nobody calls the other


async def test_only_the_tool_at_fault_is_relaxed_and_the_answer_says_so(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.reply = b"[]"
    frontend = await start_frontend(tool_call_parser="hermes", relax_tool_schemas=True)
    tools = [function("good", GOOD), function("wild", WILD["not"]), function("also", WILD["conditions"])]
    async with aiohttp.ClientSession(frontend.url) as http:
        for stream in (False, True):
            status, answer, relaxed = await ask(http, tools=tools, tool_choice="required", stream=stream)
            assert (status, relaxed) == (200, "tools.wild, tools.also"), answer
        of_responses = [{**tool["function"], "type": "function"} for tool in tools]
        asked = {"input": "hi", "tools": of_responses, "tool_choice": "required"}
        _, _, relaxed = await ask(http, "/v1/responses", **asked)
        assert relaxed == "tools.wild, tools.also"
        _, _, relaxed = await ask(http, tools=tools[:1], tool_choice="required")
        assert relaxed is None
    schema = json.loads(scheduler.submits[0].sampling.structured_output.json_schema)
    good, wild, also = (schema["$defs"][f"tool_{index}"] for index in range(3))
    assert good == {**GOOD, "additionalProperties": False}
    assert wild == also == {"type": "object"}
    assert "arguments of tools that are not enforced: wild, also" in caplog.text
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateOnce(
            pb.GenerateRequest(
                messages=pb.ChatMessages(
                    messages=[pb.ChatMessage(role="user", content="hi")],
                    tools=[pb.Tool(name="wild", parameters_json='{"not": {}}')],
                    tool_choice=pb.ToolChoice(named="wild"),
                )
            )
        )
        assert dict(iter(await call.initial_metadata()))[HEADER.lower()] == "tools.wild"
        await call


async def test_of_many_relaxed_tools_the_header_tells_as_many_as_clients_take(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"[]"
    frontend = await start_frontend(tool_call_parser="hermes", relax_tool_schemas=True)
    names = [f"{number:03}".ljust(128, "x") for number in range(80)]
    tools = [function(name, WILD["not"]) for name in names]
    told = [f"tools.{name}" for name in names]
    async with aiohttp.ClientSession(frontend.url) as http:
        status, answer, relaxed = await ask(http, tools=tools, tool_choice="required")
        assert status == 200, answer
    assert relaxed is not None
    assert relaxed.split(", ") == [*told[:15], "..."]
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        messages = pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="hi")],
            tools=[pb.Tool(name=name, parameters_json='{"not": {}}') for name in names],
            tool_choice=pb.ToolChoice(required=True),
        )
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateOnce(
            pb.GenerateRequest(messages=messages)
        )
        assert dict(iter(await call.initial_metadata()))[HEADER.lower()] == relaxed
        await call


async def test_a_format_that_is_not_strict_is_relaxed_where_the_operator_says_so(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"{}"
    names = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    schema = {"type": "object", "properties": {"names": names, "other": {"not": {"type": "null"}}}}
    kept = {"names": {"type": "array", "items": {"type": "string"}}, "other": {}}
    frontend = await start_frontend(relax_schemas=True)
    async with aiohttp.ClientSession(frontend.url) as http:
        for strict, expected in ((True, 400), (False, 200), (None, 200)):
            form = {"type": "json_schema", "name": "x", "schema": schema, "strict": strict}
            nested = {"type": "json_schema", "json_schema": {**form}}
            del nested["json_schema"]["type"]
            for asked in (
                {"path": "/v1/chat/completions", "response_format": nested},
                {"path": "/v1/responses", "input": "hi", "text": {"format": form}},
            ):
                status, answer, relaxed = await ask(http, **asked)
                assert status == expected, answer
                if expected == 400:
                    assert (
                        '"uniqueItems"' in answer["error"]["message"] or '"not"' in answer["error"]["message"]
                    )
                else:
                    assert set(relaxed.split(", ")) == {"response_format.uniqueItems", "response_format.not"}
                    sent = json.loads(scheduler.submits[-1].sampling.structured_output.json_schema)
                    assert sent == {"type": "object", "properties": kept, "additionalProperties": False}
        status, answer, _ = await ask(http, guided_json=schema)
        assert status == 400
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
        status, answer, _ = await ask(http, response_format=form)
        assert (status, answer["error"]["param"]) == (400, "response_format.json_schema.schema")


async def test_schemas_are_closed_over_every_protocol_unless_the_operator_wants_their_letter(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"{}"
    named = {"type": "function", "function": {"name": "f"}}
    tools = [function("f", {"type": "object"})]
    for is_open in (False, True):
        frontend = await start_frontend(tool_call_parser="hermes", open_schemas=is_open)
        scheduler.submits.clear()
        async with aiohttp.ClientSession(frontend.url) as http:
            form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": GOOD}}
            await ask(http, response_format=form)
            await post(http, "/v1/completions", {"prompt": "x", "guided_json": GOOD})
            text = {"format": {"type": "json_schema", "name": "x", "schema": GOOD}}
            await ask(http, "/v1/responses", input="hi", text=text)
            await ask(http, tools=tools, tool_choice=named)
        async with grpc.aio.insecure_channel(frontend.target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            constraint = pb.StructuredOutput(json_schema=json.dumps(GOOD))
            sampling = pb.SamplingParams(structured_output=constraint)
            await stub.GenerateOnce(pb.GenerateRequest(text="x", sampling=sampling))
        sent = [json.loads(each.sampling.structured_output.json_schema) for each in scheduler.submits]
        assert len(sent) == 5
        *schemas, of_tool, of_grpc = sent
        for schema in (*schemas, of_grpc):
            assert schema == (GOOD if is_open else {**GOOD, "additionalProperties": False})
        no_arguments = {"type": "object", "properties": {}, "additionalProperties": False}
        assert of_tool == ({"type": "object"} if is_open else no_arguments)


CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>'


async def test_a_model_whose_template_has_no_place_for_tools_calls_in_the_generic_format(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.max_model_len = 4000
    frontend = await start_frontend()
    tools = [function("f", GOOD, description="Weather")]
    system = {"role": "system", "content": "Be brief."}
    async with aiohttp.ClientSession(frontend.url) as http:
        scheduler.reply = f"I look.\n{CALL}".encode()
        _, answer, _ = await ask(http, messages=[system, USER], tools=tools)
        message = answer["choices"][0]["message"]
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert message["content"] == "I look."
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"city": "Rome"}'}
        prompt = bytes(scheduler.submits[-1].token_ids).decode()
        assert prompt.startswith("<system>Be brief.\n\nYou can call tools.")
        assert json.dumps(tools[0]["function"]) in prompt
        assert prompt.endswith("<user>hi<assistant>")
        assert "enum" in scheduler.submits[-1].sampling.structured_output.grammar
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "warm"}
        scheduler.reply = b"It is warm."
        history = [system, USER, message, result]
        _, answer, _ = await ask(http, messages=history, tools=tools, tool_choice="none")
        assert answer["choices"][0]["message"]["content"] == "It is warm."
        prompt = bytes(scheduler.submits[-1].token_ids).decode()
        assert prompt == (
            f"<system>Be brief.<user>hi<assistant>I look.\n\n{CALL}"
            "<user><tool_response>\nwarm\n</tool_response><assistant>"
        )
        assert not scheduler.submits[-1].sampling.HasField("structured_output")
        free = {"tools": tools, "ignore_eos": True, "max_tokens": 5}
        status, answer, _ = await ask(http, **free)
        assert status == 200, answer


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
    ids=["refused", "left out"],
)
async def test_where_the_template_shows_no_system_turn_the_user_tells_of_the_tools(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, template: str
) -> None:
    scheduler.max_model_len, scheduler.reply = 4000, b"x"
    frontend = await start_frontend(chat_template=template)
    async with aiohttp.ClientSession(frontend.url) as http:
        status, answer, _ = await ask(http, tools=[function("f", GOOD)])
        assert status == 200, answer
    prompt = bytes(scheduler.submits[-1].token_ids).decode()
    assert prompt.startswith("<user>You can call tools.")
    assert prompt.endswith("\n\nhi")
