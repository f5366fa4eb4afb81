"""The Python clients: conversations as OpenAI's API writes them, against a scripted scheduler."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from pagewire.base.errors import InvalidRequest
from pagewire.client import AsyncClient, Client
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler
from tests.unit.frontend.test_chat import CALL, THOUGHT, TOOLS
from tests.unit.frontend.test_http import post

USER = {"role": "user", "content": "hi"}
SHOWN = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ enable_thinking }}"
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {**USER, "name": "Ann"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "refusal": None,
        "annotations": [],
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


@pytest.fixture
async def frontend(start_frontend: FrontendFactory, scheduler: ScriptedScheduler) -> RunningFrontend:
    scheduler.max_model_len = 2000
    return await start_frontend(
        chat_template=SHOWN + "{# tool_calls #}", tool_call_parser="hermes", reasoning_parser="qwen3"
    )


@pytest.fixture
async def client(frontend: RunningFrontend) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(frontend.target) as client:
        yield client


async def test_a_conversation_is_the_same_prompt_as_over_http(frontend, client, scheduler) -> None:
    scheduler.reply = b"x"
    fields: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    async with aiohttp.ClientSession(frontend.url) as http:
        status, body = await post(http, "/v1/chat/completions", {"messages": HISTORY, **fields})
    assert status == 200, body
    await client.generate(messages=HISTORY, **fields)
    over_http, from_client = (bytes(submit.token_ids).decode() for submit in scheduler.submits)
    assert over_http == from_client == bytes(await client.tokenize(messages=HISTORY, **fields)).decode()
    assert from_client.endswith("False")
    assert '{"city": "Rome"}' in from_client


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
async def test_calls_may_have_their_arguments_as_text_or_as_an_object(client, arguments: Any) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    prompt = bytes(await client.tokenize(messages=[USER, turn])).decode()
    assert '"arguments": {"city": "Rome"}' in prompt


async def test_an_answer_with_a_call_goes_back_into_the_conversation(client, scheduler) -> None:
    scheduler.reply = f"{THOUGHT}I look.\n{CALL}".encode()
    whole = await client.generate(messages=[USER], tools=TOOLS)
    [choice] = whole.choices
    assert (choice.text, choice.reasoning) == ("I look.", "Hm.")
    turn = {"role": "assistant", "content": choice.text, "tool_calls": choice.tool_calls}
    result = {"role": "tool", "tool_call_id": choice.tool_calls[0].id, "content": "warm"}
    prompt = bytes(await client.tokenize(messages=[USER, turn, result])).decode()
    assert '"arguments": {"city": "Zürich"}' in prompt
    assert prompt.count(choice.tool_calls[0].id) == 2


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ("required", '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'),
        ({"type": "function", "function": {"name": "get_weather"}}, '{"city": "Rome"}'),
    ],
)
async def test_a_call_may_be_forced(client, scheduler, choice: Any, reply: str) -> None:
    scheduler.reply = f"{THOUGHT}{reply}".encode()
    whole = await client.generate(messages=[USER], tools=TOOLS, tool_choice=choice)
    [call] = whole.choices[0].tool_calls
    assert (call.name, json.loads(call.arguments_json)) == ("get_weather", {"city": "Rome"})
    assert scheduler.submits[0].sampling.HasField("structured_output")


async def test_no_call_is_read_where_none_may_be_made(client, scheduler) -> None:
    scheduler.reply = b'[{"name": "get_weather"}]'
    whole = await client.generate(messages=[USER], tools=TOOLS, tool_choice="none")
    assert (whole.text, len(whole.choices)) == ('[{"name": "get_weather"}]', 0)


async def test_the_blocking_client_takes_the_same(frontend, scheduler) -> None:
    scheduler.reply = f"{THOUGHT}{CALL}".encode()

    def ask() -> str:
        with Client(frontend.target) as client:
            deltas = list(client.generate(messages=[USER], tools=TOOLS, stream=True))
        return "".join(call.arguments_json for delta in deltas for call in delta.tool_calls)

    assert await asyncio.to_thread(ask) == '{"city": "Zürich"}'


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        ([{"role": "user"}], {}, r"messages\[0\] has no content"),
        ([{"role": 3, "content": "x"}], {}, r"messages\[0\].role is 3; it must be a text"),
        ([{"role": "wizard", "content": "x"}], {}, "'wizard'; it must be one of"),
        ([{**USER, "mood": "good"}], {}, r"messages\[0\].mood is not known"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"messages\[0\].content must be a text"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], {}, r"tool_calls\[0\] must be"),
        ([USER], {"tools": [{"name": "f"}]}, r"tools\[0\] must be"),
        ([USER], {"tools": [{"function": {"name": "f", "color": 1}}]}, r"tools\[0\].function.color is not"),
        ([USER], {"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "true or false"),
        ([USER], {"tool_choice": "maybe"}, "tool_choice is 'maybe'; it must be one of auto"),
        ([USER], {"tool_choice": "required"}, "needs tools"),
        ([USER], {"chat_template_kwargs": {"a": b"b"}}, "chat_template_kwargs cannot be written as JSON"),
        ([USER], {"mesages": []}, "mesages is not known"),
        (None, {"prompt": "p", "tools": TOOLS}, "tools is for conversations"),
    ],
)
async def test_what_is_wrong_is_named(client, messages: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await client.generate(messages=messages, **fields)
