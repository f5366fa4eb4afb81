"""Anthropic's messages API, through its official client, against a scripted scheduler."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import anthropic
import pytest

from frontend.caller import client_of
from pagewire.base.errors import Code
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler, failure, stop

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "name": "get_weather",
    "description": "The weather now",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
SHOW_ALL = (
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    "{{ tools | tojson if tools else '' }}{{ enable_thinking }}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}GO{% endif %}"
)


@pytest.fixture
async def frontend(start_frontend: FrontendFactory) -> RunningFrontend:
    return await start_frontend(tool_call_parser="hermes", reasoning_parser="qwen3")


@pytest.fixture
async def client(frontend: RunningFrontend):
    async with anthropic.AsyncAnthropic(base_url=frontend.url, api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


async def ask(client: anthropic.AsyncAnthropic, **fields: Any) -> Any:
    return await client.messages.create(**{"model": "bytes", "max_tokens": 150, "messages": [USER], **fields})


def told(error: anthropic.APIStatusError) -> tuple[str, str]:
    """An error's type and message."""
    body: Any = error.body
    return body["error"]["type"], body["error"]["message"]


async def shown(start_frontend: FrontendFactory, scheduler: ScriptedScheduler, **fields: Any) -> str:
    """The prompt that a template renders which shows all that it is given."""
    scheduler.reply, scheduler.max_model_len = b"x", 100_000
    frontend = await start_frontend(chat_template=SHOW_ALL, tool_call_parser="hermes")
    async with anthropic.AsyncAnthropic(base_url=frontend.url, api_key="-", max_retries=0) as client:
        await ask(client, **fields)
    return bytes(scheduler.submits[-1].token_ids).decode()


async def test_text_in_text_out(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = "héllo".encode()
    message = await ask(
        client,
        system=[
            {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "brief."},
        ],
        max_tokens=50,
        metadata={"user_id": "me"},
        extra_body={"temperature": 0.5, "top_k": 7, "top_p": 0.9},
    )
    [submit] = scheduler.submits
    assert bytes(submit.token_ids) == b"<system>Be\nbrief.<user>hi<assistant>"
    assert (submit.sampling.max_tokens, submit.sampling.temperature, submit.sampling.top_k) == (50, 0.5, 7)
    assert submit.client == client_of("me")
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "bytes")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "héllo"}]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (36, 7)
    assert message._request_id == message.id.removeprefix("msg_")


async def test_the_client_that_waits_is_served_too(frontend, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"yes"
    client = anthropic.Anthropic(base_url=frontend.url, auth_token="-", max_retries=0)
    with client:
        message = await asyncio.to_thread(
            client.messages.create, model="bytes", max_tokens=9, messages=[USER]
        )
    assert message.content[0].text == "yes"


async def test_a_stream_has_every_event_in_its_place(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}I look.\n{CALL}".encode()
    stream = await ask(client, stream=True, tools=[WEATHER])
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    folded = [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert folded == ["message_start", *block * 3, "message_delta", "message_stop"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta") == "Hm."
    assert [delta.signature for delta in deltas if delta.type == "signature_delta"] == ["unsigned"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == "I look."
    given = [delta.partial_json for delta in deltas if delta.type == "input_json_delta"]
    assert len(given) > 5
    assert json.loads("".join(given)) == {"city": "Zürich"}
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2]
    assert events[0].message.usage.input_tokens > 0
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].usage.output_tokens == len(scheduler.reply) + 1


async def test_lines_are_those_of_anthropics_servers(http, scheduler: ScriptedScheduler) -> None:
    """Their clients look at the `event:` line, and a ping follows the first block's start."""
    scheduler.reply = b"ab"
    body = {"messages": [USER], "max_tokens": 9, "stream": True}
    async with http.post("/v1/messages", json=body) as response:
        assert response.headers["request-id"] == response.headers["x-request-id"]
        assert response.content_type == "text/event-stream"
        frames = (await response.text()).strip().split("\n\n")
    events = [frame.split("\n") for frame in frames]
    for event, data in events:
        assert event.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert [event.removeprefix("event: ") for event, _ in events] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    "reply", [f"{THOUGHT}I look.\n{CALL}\n{CALL}", "Hello", "", THOUGHT, CALL, f"{THOUGHT}Yes."]
)
async def test_a_stream_adds_up_to_the_whole_message(
    client, scheduler: ScriptedScheduler, reply: str
) -> None:
    scheduler.reply = reply.encode()
    whole = (await ask(client, tools=[WEATHER])).to_dict()
    async with client.messages.stream(
        model="bytes", max_tokens=150, messages=[USER], tools=[WEATHER]
    ) as stream:
        streamed = (await stream.get_final_message()).to_dict()
    for message in (whole, streamed):
        message.pop("id")
        message.pop("stop_details", None)  # which the client itself adds to a stream's
        for block in message["content"]:
            block.pop("id", None)
    assert streamed == whole


async def test_calls_and_results_go_back_and_forth(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = CALL.encode()
    first = await ask(client, tools=[WEATHER], tool_choice={"type": "auto"})
    [call] = first.content
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Zürich"})
    assert first.stop_reason == "tool_use"
    scheduler.reply = b"Sunny."
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sun"}]}
    messages = [USER, first.to_param(), {"role": "user", "content": [result]}]
    second = await ask(client, tools=[WEATHER], messages=messages)
    assert second.content[0].text == "Sunny."
    prompt = bytes(scheduler.submits[-1].token_ids).decode()
    # The template knows neither calls nor results, so both are shown as text.
    assert (
        prompt.index("<tool_call>")
        < prompt.index("get_weather", prompt.index("<assistant>"))
        < prompt.index("sun")
    )


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ({"type": "any"}, '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'),
        ({"type": "tool", "name": "get_weather"}, '{"city": "Rome"}'),
    ],
)
async def test_a_forced_call_is_constrained(
    client, scheduler: ScriptedScheduler, choice: Any, reply: str
) -> None:
    scheduler.reply = f"{THOUGHT}{reply}".encode()
    message = await ask(client, tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert message.content[1].input == {"city": "Rome"}
    assert "city" in scheduler.submits[0].sampling.structured_output.grammar


async def test_of_two_calls_the_first_is_returned_where_parallel_ones_are_disabled(
    client, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = f"{CALL}\n{CALL}".encode()
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len((await ask(client, tools=[WEATHER], tool_choice=choice)).content) == 1
    assert len((await ask(client, tools=[WEATHER])).content) == 2


async def test_the_reason_of_the_end_is_told(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"one two three"
    cut = await ask(client, max_tokens=3)
    assert (cut.content[0].text, cut.stop_reason) == ("one", "max_tokens")
    stopped = await ask(client, stop_sequences=["two"])
    assert (stopped.content[0].text, stopped.stop_reason) == ("one ", "stop_sequence")
    assert stopped.stop_sequence == "two"
    scheduler.reply = b"x" * 500
    full = await ask(client, max_tokens=10_000)
    assert full.stop_reason == "model_context_window_exceeded"
    async with client.messages.stream(
        model="bytes", max_tokens=150, messages=[USER], stop_sequences=["xx"]
    ) as stream:
        message = await stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "xx")


async def test_an_input_that_was_cut_off_is_what_there_is_of_it(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b'<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": [1, 2]}}'
    cut = await ask(client, tools=[WEATHER], max_tokens=len(scheduler.reply) - 14)
    assert (cut.stop_reason, cut.content[0].input) == ("max_tokens", {"city": "Rome"})
    scheduler.reply = b'<tool_call>{"name": "get_weather", "arguments": {city: Rome}}</tool_call>'
    broken = await ask(client, tools=[WEATHER])
    assert broken.content[0].input == {"INVALID_JSON": "{city: Rome}"}


async def test_cached_tokens_are_counted_apart(client, scheduler: ScriptedScheduler) -> None:
    asked = asyncio.create_task(ask(client))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [104], cached=16, end=stop(256))
    usage = (await asked).usage
    num_prompt_tokens = submit.num_prompt_tokens
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt_tokens - 16, 16)
    assert usage.cache_creation_input_tokens == 0


async def test_tokens_are_counted_as_they_would_be_read(client, scheduler: ScriptedScheduler) -> None:
    count = await client.messages.count_tokens(model="bytes", messages=[USER], system="Be brief.")
    assert count.input_tokens == len(b"<system>Be brief.<user>hi<assistant>")
    assert scheduler.submits == []


async def test_the_last_message_is_gone_on_with(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"is"
    await ask(client, messages=[USER, {"role": "assistant", "content": "Paris "}])
    assert bytes(scheduler.submits[0].token_ids) == b"<user>hi<assistant>Paris "


async def test_a_schema_of_the_answer_is_enforced(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b'{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    await ask(client, output_config={"format": form, "effort": "low"})
    await ask(client, extra_body={"output_format": form})
    for submit in scheduler.submits:
        assert '"a"' in submit.sampling.structured_output.grammar


@pytest.mark.parametrize(
    ("thinking", "told"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, "True"),
        ({"type": "adaptive"}, "True"),
        ({"type": "disabled"}, "False"),
    ],
)
async def test_thinking_turns_the_templates_switch(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, thinking: Any, told: str
) -> None:
    fields = {"thinking": thinking, "output_config": {"effort": "max"}}
    prompt = await shown(start_frontend, scheduler, **fields)
    assert prompt.endswith(f"{told}maxGO")


async def test_thoughts_are_left_out_on_request(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{THOUGHT}Yes".encode()
    message = await ask(client, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["text"]


async def test_what_claude_code_sends_is_taken(client, scheduler: ScriptedScheduler) -> None:
    """Fields of its betas that ask for nothing that could be seen; and a line that differs in each request,
    with which no prompt would be found in the cache."""
    scheduler.reply = b"x"
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    await client.beta.messages.create(
        model="bytes",
        max_tokens=20_000,
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=eb6c6;"},
            {"type": "text", "text": "Be brief.", **cached},
        ],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", **cached}]}],
        tools=[{**WEATHER, **cached, "type": "custom", "eager_input_streaming": True}],
        metadata={"user_id": "user_1_session_2"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        service_tier="auto",
        speed="standard",
        cache_control={"type": "ephemeral"},
        mcp_servers=[],
        extra_body={"container": None, "diagnostics": {"previous_message_id": None}, "inference_geo": "us"},
    )
    assert bytes(scheduler.submits[0].token_ids) == b"<system>Be brief.<user>hi<assistant>"


PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": (
        {"messages": [{"role": "user", "content": [PICTURE]}]},
        "messages[0].content[0] is an image",
    ),
    "a PDF": (
        {"messages": [{"role": "user", "content": [PDF]}]},
        "reads text only: send the document's text",
    ),
    "a server's tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]},
        "tools[0].type is 'web_search_20250305'; this server has none of Anthropic's tools",
    ),
    "a container": ({"extra_body": {"container": "x"}}, "this server runs no code"),
    "MCP servers": ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers is not supported"),
    "an unknown field": ({"extra_body": {"foo": 1}}, "supplied: foo"),
    "an unknown block": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "messages[0].content[0] is wrong: its type must be text, thinking",
    ),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    "nothing to answer": ({"messages": []}, "messages has 0 entries"),
    "a choice of nothing": ({"tool_choice": {"type": "any"}}, "it needs tools"),
    "an unnamed choice": ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "needs a name"),
    "a prompt beyond the context": (
        {"messages": [{"role": "user", "content": "x" * 300}]},
        "prompt is too long: the prompt has 317 tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_done_is_refused_with_the_reason(client, case: str) -> None:
    fields, words = REFUSED[case]
    with pytest.raises(anthropic.BadRequestError) as caught:
        await ask(client, **fields)
    kind, message = told(caught.value)
    assert kind == "invalid_request_error"
    assert words in message
    assert caught.value.body["request_id"] == caught.value.request_id


async def test_max_tokens_is_required(http) -> None:
    async with http.post("/v1/messages", json={"messages": [USER]}) as response:
        body = await response.json()
    assert response.status == 400
    assert body["error"] == {"type": "invalid_request_error", "message": "you must provide max_tokens"}


async def test_errors_have_the_types_of_anthropics_client(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(api_keys=("secret",), max_body_bytes=10_000)
    options: dict[str, Any] = {"base_url": frontend.url, "max_retries": 0}
    async with anthropic.AsyncAnthropic(**options, api_key="wrong") as client:
        with pytest.raises(anthropic.AuthenticationError) as unauthenticated:
            await ask(client)
    assert told(unauthenticated.value)[0] == "authentication_error"
    async with anthropic.AsyncAnthropic(**options, api_key="secret") as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await ask(client, model="claude")
        assert told(missing.value)[0] == "not_found_error"
        with pytest.raises(anthropic.RequestTooLargeError) as large:
            await ask(client, system="x" * 20_000)
        assert told(large.value)[0] == "request_too_large"
        for code, kind, name in (
            (Code.RESOURCE_EXHAUSTED, anthropic.RateLimitError, "rate_limit_error"),
            (Code.UNAVAILABLE, anthropic.OverloadedError, "overloaded_error"),
            (Code.INTERNAL, anthropic.InternalServerError, "api_error"),
        ):
            asked = asyncio.create_task(ask(client))
            submit = await scheduler.submitted(len(scheduler.submits) + 1)
            await scheduler.say(submit.handle, [], end=failure(code, "no"))
            with pytest.raises(kind) as caught:
                await asked
            assert told(caught.value) == (name, "no")
            assert caught.value.request_id == caught.value.body["request_id"]


async def test_a_stream_that_fails_ends_with_an_error(client, scheduler: ScriptedScheduler) -> None:
    stream, handle = await begun_stream(client, scheduler)
    await scheduler.say(handle, [], end=failure(Code.INTERNAL, "broken"))
    seen: list[str] = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        await read_kinds(stream, seen)
    assert seen == ["message_start", "content_block_start", "content_block_delta"]
    assert told(caught.value) == ("api_error", "broken")


async def test_an_answer_that_the_server_gives_up_is_an_error_to_retry(
    client, scheduler: ScriptedScheduler
) -> None:
    aborted = pb.Ended(reason=pb.END_REASON_ABORT)
    asked = asyncio.create_task(ask(client))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [104], end=aborted)
    with pytest.raises(anthropic.OverloadedError):
        await asked
    stream, handle = await begun_stream(client, scheduler)
    await scheduler.say(handle, [104], end=aborted)
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        await read_kinds(stream, [])


async def begun_stream(client: anthropic.AsyncAnthropic, scheduler: ScriptedScheduler) -> tuple[Any, int]:
    """A stream that has one token, and its handle."""
    asked = asyncio.create_task(ask(client, stream=True))
    submit = await scheduler.submitted(len(scheduler.submits) + 1)
    await scheduler.say(submit.handle, [104], cached=0)
    return await asked, submit.handle


async def read_kinds(stream: Any, seen: list[str]) -> None:
    async for event in stream:
        seen += [event.type]


async def test_paths_below_have_errors_of_the_same_form(http) -> None:
    async with http.get("/v1/messages/batches") as response:
        body = await response.json()
    assert (response.status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    async with http.get("/v1/messages") as response:
        body = await response.json()
    assert (response.status, body["error"]["type"]) == (405, "invalid_request_error")


async def test_models_are_listed(client) -> None:
    [model] = [model async for model in client.models.list()]
    assert (model.id, model.display_name, model.type) == ("bytes", "bytes", "model")
    assert model.created_at.year >= 2024
    assert (await client.models.retrieve("bytes")).id == "bytes"
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("claude")
