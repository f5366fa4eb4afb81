"""Tools, thoughts and templates over both protocols, against a scripted scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pydantic
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler
from tests.unit.frontend.test_http import frames, post

USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
CHAT: dict[str, Any] = {"model": "bytes", "messages": [USER], "tools": TOOLS}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
SHOW_ALL = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}"


@pytest.fixture
async def frontend(start_frontend: FrontendFactory) -> RunningFrontend:
    return await start_frontend(
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
        trust_request_chat_template=True,
    )


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


@pytest.fixture
async def stub(frontend: RunningFrontend):
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def test_calls_and_thoughts_are_parts_of_the_message(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}I look.\n{CALL}".encode()
    status, body = await post(http, "/v1/chat/completions", {**CHAT, "max_tokens": 150, "messages": [USER]})
    assert status == 200, body
    (choice,) = body["choices"]
    message = choice["message"]
    (call,) = message.pop("tool_calls")
    assert message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "reasoning": "Hm.",
    }
    assert call.pop("id").startswith("call_")
    assert call == {
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
    }
    assert choice["finish_reason"] == "tool_calls"


async def test_a_stream_names_a_call_once_and_then_sends_its_arguments(
    http, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = f"{THOUGHT}{CALL}".encode()
    async with http.post("/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        *chunks, done = await frames(response)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert not any(delta.get("content") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    first, *rest = calls
    assert first["index"] == 0
    assert first["type"] == "function"
    assert first["id"]
    assert first["function"]["name"] == "get_weather"
    assert len(rest) > 5
    assert all(set(call) == {"index", "function"} and call["index"] == 0 for call in rest)
    assert all(set(call["function"]) == {"arguments"} for call in rest)
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Zürich"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    # What is seen first is seen only with what comes before it.
    kinds = [name for delta in deltas for name in delta if name in ("reasoning_content", "tool_calls")]
    assert kinds == sorted(kinds)


async def test_thoughts_are_left_out_on_request(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}Yes".encode()
    body = {"messages": [USER], "include_reasoning": False}
    _, whole = await post(http, "/v1/chat/completions", body)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Yes"}
    async with http.post("/v1/chat/completions", json={**body, "stream": True}) as response:
        assert "Hm" not in await response.text()


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ("required", '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'),
        ({"type": "function", "function": {"name": "get_weather"}}, '{"city": "Rome"}'),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            '[{"name": "get_weather", "parameters": {"city": "Rome"}}]',
        ),
    ],
)
async def test_a_forced_call_constrains_every_choice(
    http, scheduler: ScriptedScheduler, choice: Any, reply: str
) -> None:
    scheduler.reply = f"{THOUGHT}{reply}".encode()
    _, body = await post(http, "/v1/chat/completions", {**CHAT, "tool_choice": choice, "n": 2})
    for each in body["choices"]:
        (call,) = each["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert each["finish_reason"] == "tool_calls"
        assert each["message"]["reasoning_content"] == "Hm."
    assert len(scheduler.submits) == 2
    for submit in scheduler.submits:
        assert "get_weather" in submit.sampling.structured_output.grammar or "city" in (
            submit.sampling.structured_output.grammar
        )


async def test_a_call_cut_off_by_its_length_is_no_finished_call(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = CALL.encode()
    _, body = await post(http, "/v1/chat/completions", {**CHAT, "max_tokens": len(CALL) - 20})
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city": "Z')


async def test_without_tools_what_looks_like_a_call_is_text(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = CALL.encode()
    for body in ({"messages": [USER]}, {**CHAT, "tool_choice": "none"}):
        _, answer = await post(http, "/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"] == CALL
        assert answer["choices"][0]["finish_reason"] == "stop"


async def test_a_schema_is_submitted_and_thoughts_may_come_before_it(
    http, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"{}"
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    await post(http, "/v1/chat/completions", {"messages": [USER], "response_format": response_format})
    grammar = scheduler.submits[0].sampling.structured_output.grammar
    assert "<think>" in grammar
    assert '"city"' in grammar
    await post(http, "/v1/completions", {"prompt": "x", "response_format": response_format})
    closed = json.loads(scheduler.submits[1].sampling.structured_output.json_schema)
    assert closed == {**PARAMETERS, "additionalProperties": False}


class _City(pydantic.BaseModel):
    city: str


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
async def test_the_official_clients_messages_go_back_as_they_are(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    """Its helpers add fields of their own to a message: what they parsed of it."""
    scheduler.max_model_len = 3000
    tool = openai.pydantic_function_tool(_City, name="get_weather")
    asked: dict[str, Any] = {"model": "bytes", "tools": [tool], "max_tokens": 300}
    async with openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="-", max_retries=0) as client:
        chat = client.chat.completions
        for reply, form in (
            (CALL.replace("Zürich", "Rome"), {}),
            ('{"city": "Rome"}', {"response_format": _City}),
        ):
            scheduler.reply = f"{THOUGHT}{reply}".encode()
            whole = await chat.parse(messages=[USER], **asked, **form)
            async with chat.stream(messages=[USER], **asked, **form) as stream:
                streamed = await stream.get_final_completion()
            for completion in (whole, streamed):
                message = completion.choices[0].message
                assert message.parsed or message.tool_calls[0].function.parsed_arguments
                results = [
                    {"role": "tool", "tool_call_id": call.id, "content": "warm"}
                    for call in message.tool_calls or ()
                ]
                for sent in (message, message.model_dump()):
                    await chat.create(messages=[USER, sent, *results, USER], model="bytes", max_tokens=1)


HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    USER,
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "warm"},
]


def as_chat_messages(**fields: Any) -> pb.ChatMessages:
    call = pb.ToolCall(id="1", name="get_weather", arguments_json='{"city": "Rome"}')
    return pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="developer", content="a\nb"),
            pb.ChatMessage(role="user", content="hi"),
            pb.ChatMessage(role="assistant", tool_calls=[call], reasoning="Hm."),
            pb.ChatMessage(role="tool", tool_call_id="1", content="warm"),
        ],
        tools=[pb.Tool(name="get_weather", parameters_json=json.dumps(PARAMETERS))],
        **fields,
    )


async def test_templates_see_the_same_over_both_protocols(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    scheduler.max_model_len = 2000
    scheduler.reply = b"x"
    frontend = await start_frontend(chat_template=SHOW_ALL + "{# tool_calls #}", tool_call_parser="hermes")
    async with aiohttp.ClientSession(frontend.url) as http:
        status, body = await post(http, "/v1/chat/completions", {"messages": HISTORY, "tools": TOOLS})
        assert status == 200, body
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.GenerateOnce(pb.GenerateRequest(messages=as_chat_messages()))
        tokenized = await stub.Tokenize(pb.TokenizeRequest(messages=as_chat_messages()))
    over_http, over_grpc = (bytes(submit.token_ids).decode() for submit in scheduler.submits)
    assert over_http == over_grpc == bytes(tokenized.token_ids).decode()
    decoder, turns = json.JSONDecoder(), []
    rest = over_http
    while rest:
        turn, end = decoder.raw_decode(rest)
        turns.append(turn)
        rest = rest[end:]
    *turns, tools = turns
    assert tools == TOOLS
    assert turns[0] == {"role": "system", "content": "a\nb"}
    assert turns[2]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert turns[2]["reasoning_content"] == "Hm."
    assert "content" not in turns[2]
    assert turns[3] == {"role": "tool", "tool_call_id": "1", "content": "warm"}


async def test_requests_bring_templates_variables_and_documents(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    body = {
        "messages": [USER],
        "chat_template": "{{ documents[0].title }}{{ enable_thinking }}{{ reasoning_effort }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "documents": [{"title": "T"}],
    }
    status, answer = await post(http, "/v1/chat/completions", body)
    assert status == 200, answer
    _, tokenized = await post(http, "/tokenize", body)
    assert bytes(scheduler.submits[0].token_ids) == b"TFalselow" == bytes(tokenized["tokens"])


async def test_grpc_streams_thoughts_and_calls(stub, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}Well.\n{CALL}".encode()
    request = pb.GenerateRequest(
        messages=pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="hi")],
            tools=[pb.Tool(name="get_weather", parameters_json=json.dumps(PARAMETERS))],
        )
    )
    *deltas, end = [event async for event in stub.Generate(request)]
    assert "".join(event.delta.reasoning for event in deltas) == "Hm."
    assert "".join(event.delta.text for event in deltas) == "Well."
    first, *rest = [call for event in deltas for call in event.delta.tool_calls]
    assert (first.name, bool(first.id)) == ("get_weather", True)
    assert first.arguments_json + "".join(call.arguments_json for call in rest) == '{"city": "Zürich"}'
    assert end.finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    whole = await stub.GenerateOnce(request)
    assert whole.choices[0].reasoning == "Hm."
    assert whole.choices[0].tool_calls[0].arguments_json == '{"city": "Zürich"}'
    request.messages.include_reasoning = False
    assert (await stub.GenerateOnce(request)).choices[0].reasoning == ""


def named(message: pb.ChatMessages) -> None:
    message.tool_choice.named = "get_weather"


def strict(message: pb.ChatMessages) -> None:
    message.tools[0].strict = True


@pytest.mark.parametrize("change", [named, strict])
async def test_grpc_forces_and_holds_calls(
    stub, scheduler: ScriptedScheduler, change: Callable[[pb.ChatMessages], None]
) -> None:
    scheduler.max_model_len = 2000
    scheduler.reply = b'{"city": "Rome"}'
    request = pb.GenerateRequest(messages=as_chat_messages())
    change(request.messages)
    await stub.GenerateOnce(request)
    assert "city" in scheduler.submits[0].sampling.structured_output.grammar


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chat_template_kwargs_json": "{"}, "chat_template_kwargs_json is no JSON"),
        ({"chat_template_kwargs_json": "[]"}, "must be an object"),
        ({"documents_json": "{}"}, "must be a list"),
        ({"documents_json": "[1]"}, "list of objects"),
        ({"documents_json": "[" * 100_000}, "documents_json is no JSON"),
        ({"tool_choice": pb.ToolChoice(required=False)}, "required is false"),
        ({"tool_choice": pb.ToolChoice(named="other")}, "the tools are 'get_weather'"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "set one of them"),
    ],
)
async def test_grpc_names_what_is_wrong(stub, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=said) as raised:
        await stub.GenerateOnce(pb.GenerateRequest(messages=as_chat_messages(**fields)))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deeply_nested_schema_is_the_callers_error(stub) -> None:
    schema = '{"properties": {"a": ' * 300 + "{}" + "}}" * 300
    messages = pb.ChatMessages(
        messages=[pb.ChatMessage(role="user", content="hi")],
        tools=[pb.Tool(name="f", parameters_json=schema, strict=True)],
    )
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GenerateOnce(pb.GenerateRequest(messages=messages))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_logprobs_cover_every_token_of_thoughts_and_calls(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}{CALL}".encode()
    body = {**CHAT, "return_token_ids": True}
    _, whole = await post(http, "/v1/chat/completions", body)
    async with http.post("/v1/chat/completions", json={**body, "stream": True}) as response:
        *chunks, _ = await frames(response)
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids") or ()]
    assert ids == whole["choices"][0]["token_ids"]
    assert bytes(ids[:-1]) == scheduler.reply


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"if": {}}, "strict": True}}
                ]
            },
            "tools",
            "tool 'f' cannot be enforced: \"if\" cannot be",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
                "tool_choice": "required",
            },
            "tools",
            "tool 'f' cannot be enforced: Invalid type: strin",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"if": {}}}}},
            "response_format.json_schema.schema",
            'the JSON schema: "if" cannot be enforced',
        ),
    ],
)
async def test_a_schema_that_cannot_be_enforced_is_named(
    http, body: dict[str, Any], param: str, said: str
) -> None:
    status, answer = await post(http, "/v1/chat/completions", {"messages": [USER], **body})
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]
