"""A conversation is never stuck because of its own history: whatever the server answered can be sent back."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frontend.config import FrontendConfig
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.wire.chat_messages import to_chat_messages
from tests.unit.frontend.conftest import RunningFrontend, until_ready
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler

TEMPLATES = Path(__file__).parents[1] / "text" / "templates"
FORMATS = {"hermes": "qwen3", "llama3_json": "llama31", "mistral": "mistral"}
USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"a": {}}}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
NAMED = {"type": "function", "function": {"name": "f"}}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = JSON.map(json.dumps) | st.sampled_from(
    ['{"a": "\\ud83d"}', '{"a": ', "{}", "null", "[1]", "", "{}}"]
)
PIECES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["<think>", "</think>", "\n", " ", "{", "[TOOL_CALLS]", "[ARGS]", ";"]),
    ARGUMENTS.map(lambda text: f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'),
    ARGUMENTS.map(lambda text: f'{{"name": "f", "parameters": {text}}}'),
    ARGUMENTS.map(lambda text: f'[TOOL_CALLS][{{"name": "f", "arguments": {text}}}]'),
    ARGUMENTS.map(lambda text: f"[TOOL_CALLS]f[ARGS]{text}"),
)
REPLIES = st.lists(PIECES, max_size=4).map("".join)
CUTS = st.integers(1, 60) | st.just(1000)


@dataclass
class Service:
    """A frontend and its scripted scheduler, on a loop of their own."""

    scheduler: ScriptedScheduler
    http: httpx.Client
    stub: inference_pb2_grpc.InferenceServiceStub

    def ask(self, path: str, **fields: object) -> httpx.Response:
        answer = self.http.post(path, json={"model": "bytes", **fields})
        assert answer.status_code == 200, answer.text
        return answer

    @property
    def last_prompt(self) -> str:
        return bytes(token for token in self.scheduler.submits[-1].token_ids if token != EOS).decode()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module", params=FORMATS)
def service(
    request: pytest.FixtureRequest,
    loop: asyncio.AbstractEventLoop,
    model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("history") / "scheduler.sock"

    async def start() -> tuple[ScriptedScheduler, RunningFrontend]:
        scheduler = await ScriptedScheduler(str(path), max_model_len=100_000).start()
        config = FrontendConfig(
            model=str(model_dir),
            scheduler=scheduler.target,
            served_model_names=("bytes",),
            host="127.0.0.1",
            port=0,
            grpc_port=0,
            reuse_port=False,
            chat_template=str(TEMPLATES / f"{FORMATS[request.param]}.jinja"),
            tool_call_parser=request.param,
            reasoning_parser="qwen3",
        )
        frontend = RunningFrontend(config)
        await frontend.start()
        await until_ready(frontend)
        return scheduler, frontend

    async def stop() -> None:
        await frontend.stop(drain_timeout=0, refuse_grace=0)
        await scheduler.stop()

    scheduler, frontend = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    with (
        httpx.Client(base_url=frontend.url, timeout=30) as http,
        grpc.insecure_channel(frontend.target) as channel,
    ):
        yield Service(scheduler, http, inference_pb2_grpc.InferenceServiceStub(channel))
    asyncio.run_coroutine_threadsafe(stop(), loop).result(60)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def accumulated(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A message as a client puts it together from deltas: texts are joined, calls too, by their index."""
    message: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]):
        for name, value in delta.items():
            if name == "role":
                message[name] = value
            elif name != "tool_calls":
                message[name] = message.get(name, "") + value
        for news in delta.get("tool_calls", ()):
            call = calls.setdefault(news["index"], {**news, "function": {"name": "", "arguments": ""}})
            for name, value in news["function"].items():
                call["function"][name] += value
    return {**message, "tool_calls": list(calls.values())} if calls else message


def few(test: Any) -> Any:
    """Each example is two or three requests."""
    return settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])(test)


TWO_CALLS = '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}'
"""In Llama's format, whose template refuses them."""


@few
@example(reply=TWO_CALLS, cut=1000, stream=False, tools=True)
@given(reply=REPLIES, cut=CUTS, stream=st.booleans(), tools=st.booleans())
def test_any_message_goes_back_as_it_came(
    service: Service, reply: str, cut: int, stream: bool, tools: bool
) -> None:
    service.scheduler.reply = reply.encode()
    fields: dict[str, Any] = {"max_tokens": cut, **({"tools": CHAT_TOOLS} if tools else {})}
    answer = service.ask("/v1/chat/completions", messages=[USER], stream=stream, **fields)
    message = accumulated(events(answer)) if stream else answer.json()["choices"][0]["message"]
    service.ask("/v1/chat/completions", messages=[USER, message, USER], **fields)
    nulls = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "parsed": None}
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "ok"}]}
        for call in message.get("tool_calls", ())
    ]
    service.ask("/v1/chat/completions", messages=[USER, {**nulls, **message}, *results, USER], **fields)
    if results:
        assert '"name": "f"' in service.last_prompt


@few
@given(reply=REPLIES, cut=CUTS, stream=st.booleans(), tools=st.booleans())
def test_any_response_goes_back_as_it_came(
    service: Service, reply: str, cut: int, stream: bool, tools: bool
) -> None:
    service.scheduler.reply = reply.encode()
    fields: dict[str, Any] = {"max_output_tokens": cut}
    if tools:
        fields["tools"] = [{"type": "function", **FUNCTION}]
    answer = service.ask("/v1/responses", input="hi", stream=stream, **fields)
    output = events(answer)[-1]["response"]["output"] if stream else answer.json()["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "ok"}
        for item in output
        if item["type"] == "function_call"
    ]
    for items in (output, [*output, *results]):
        service.ask("/v1/responses", input=[USER, *items, USER], **fields)


@few
@given(reply=REPLIES, cut=CUTS, stream=st.booleans(), tools=st.booleans())
def test_any_grpc_message_goes_back_as_it_came(
    service: Service, reply: str, cut: int, stream: bool, tools: bool
) -> None:
    service.scheduler.reply = reply.encode()

    def request(*messages: pb.ChatMessage) -> pb.GenerateRequest:
        given = [pb.Tool(name="f", parameters_json=json.dumps(PARAMETERS))] if tools else []
        user = pb.ChatMessage(role="user", content="hi")
        asked = [user, *messages, user] if messages else [user]
        chat = pb.ChatMessages(messages=asked, tools=given)
        return pb.GenerateRequest(messages=chat, sampling=pb.SamplingParams(max_tokens=cut))

    message = pb.ChatMessage(role="assistant")
    if stream:
        for event in service.stub.Generate(request()):
            message.content += event.delta.text
            message.reasoning += event.delta.reasoning
            for news in event.delta.tool_calls:
                if news.index == len(message.tool_calls):
                    message.tool_calls.add(id=news.id, name=news.name)
                message.tool_calls[news.index].arguments_json += news.arguments_json
    else:
        whole = service.stub.GenerateOnce(request())
        message.content = whole.text
        for choice in whole.choices:
            message.reasoning = choice.reasoning
            message.tool_calls.extend(choice.tool_calls)
    service.stub.GenerateOnce(request(message))
    results = [pb.ChatMessage(role="tool", tool_call_id=call.id, content="ok") for call in message.tool_calls]
    service.stub.GenerateOnce(request(message, *results))


def calling(**function: object) -> dict[str, Any]:
    call = {"id": "call_of_another_server", "type": "function", "function": {"name": "f", **function}}
    return {"tool_calls": [call]}


ODD_TURNS: dict[str, dict[str, Any]] = {
    "cut off": calling(arguments='{"a": "b'),
    "a list": calling(arguments="[1]"),
    "null as text": calling(arguments="null"),
    "null": calling(arguments=None),
    "empty": calling(arguments=""),
    "missing": calling(),
    "an object": calling(arguments={"a": 1}),
    "deep": calling(arguments='{"a":' * 900 + "1" + "}" * 900),
    "half a character": calling(arguments='{"a": "\\ud800"}'),
    "two calls": {"tool_calls": [{"id": str(number), "function": {"name": "f"}} for number in range(2)]},
    "null content": {"content": None},
    "no content": {},
    "no calls": {"content": None, "tool_calls": []},
    "reasoning only": {"reasoning_content": "Hm."},
    "parts": {"content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
    "refusal": {"content": None, "refusal": "No."},
    "fields of a newer client": {"content": "a", "annotations": [{"type": "url_citation"}], "phase": None},
}


@pytest.mark.parametrize("turn", ODD_TURNS)
def test_odd_turns_of_the_assistant_are_taken(service: Service, turn: str) -> None:
    service.scheduler.reply = b"x"
    message = {"role": "assistant", **ODD_TURNS[turn]}
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": content}
        for call in message.get("tool_calls", ())
        for content in ("ok", [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}], None)
    ]
    system = {"role": "system", "content": [{"type": "text", "text": "s"}]}
    messages = [system, USER, message, *results, USER]
    for tools in ([], CHAT_TOOLS):
        service.ask("/v1/chat/completions", messages=messages, tools=tools, max_tokens=1)
    assert service.ask("/tokenize", messages=messages).json()["count"]


@pytest.mark.parametrize("arguments", ['{"a": "b', "[1]", "null", None, "", {"a": 1}])
def test_odd_calls_are_taken_as_items(service: Service, arguments: object) -> None:
    service.scheduler.reply = b"x"
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments, "namespace": None}
    output = {"type": "function_call_output", "call_id": "1", "output": None}
    said = {"type": "message", "role": "assistant", "content": None, "phase": "commentary"}
    service.ask("/v1/responses", input=[USER, said, call, output, USER], max_output_tokens=1)


def test_our_client_takes_a_turn_without_content(service: Service) -> None:
    service.scheduler.reply = b"x"
    turn = {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": "Hm."}
    service.stub.GenerateOnce(pb.GenerateRequest(messages=to_chat_messages([USER, turn, USER])))
