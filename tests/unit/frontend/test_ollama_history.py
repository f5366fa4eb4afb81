"""Earlier turns in Ollama's API: whatever its clients keep of answers can be sent back."""

from __future__ import annotations

import json
import random
from typing import Any

import ollama
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend.chat.arguments import read_arguments
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.ollama.lines import ChatLines, Times, _called, _Calls
from frontend.http.ollama.schemas.messages import OllamaMessage, for_template
from frontend.text.tokenizer import TextTokenizer
from tests.unit.frontend.conftest import CHATML, FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: ToolCallDelta(0, "call_1", name, arguments),
    st.text(min_size=1, max_size=5),
    st.one_of(
        VALUES.map(json.dumps),
        st.dictionaries(st.text(max_size=3), VALUES).map(json.dumps).map(lambda text: text[:-1]),
        st.just(""),
        st.just('{"x": NaN}'),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text(max_size=5), thinking=st.text(max_size=5), calls=st.lists(CALLS, max_size=3), keeps_ids=...
)
def test_any_answer_can_be_sent_back(
    text: str, thinking: str, calls: list[ToolCallDelta], keeps_ids: bool
) -> None:
    lines = ChatLines(model="m", times=Times(), tokenizer=TextTokenizer.without_text())
    said = [(found, cut_off) for found, cut_off in map(_called, calls)]
    told = [call for found, _ in said for call in found]
    answer = lines._said(text + "".join(cut_off for _, cut_off in said), thinking, told)["message"]
    answer = json.loads(json.dumps(answer, allow_nan=False))
    if not keeps_ids:  # as Ollama's own client
        answer["tool_calls"] = [{"function": call["function"]} for call in answer.pop("tool_calls", ())]
    results = [{"role": "tool", "content": "done"} for _ in told]
    messages = [OllamaMessage.model_validate(turn) for turn in (USER, answer, *results)]
    _, turn, *answered = for_template(messages)
    assert turn.get("content", "") == answer["content"]
    assert [call["function"]["arguments"] for call in turn.get("tool_calls", ())] == [
        call["function"]["arguments"] for call in told
    ]
    assert [each["tool_call_id"] for each in answered] == [call["id"] for call in turn.get("tool_calls", ())]


@pytest.mark.parametrize("arguments", [None, "", "{", "[1]", "null", '{"a": 1}', [1], 5])
def test_arguments_of_earlier_calls_are_taken_in_any_form(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    message = OllamaMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    ((turn,)) = for_template([message])
    assert turn["tool_calls"][0]["function"]["arguments"] == read_arguments(arguments)


@pytest.fixture
async def client(frontend: RunningFrontend):
    client = ollama.AsyncClient(frontend.url)
    yield client
    await client.close()


def prompt_of(scheduler: ScriptedScheduler) -> str:
    return bytes(scheduler.submits[-1].token_ids).decode()


@pytest.mark.parametrize(
    "turn", [{}, {"content": None}, {"content": ""}, {"tool_calls": []}, {"thinking": "Hm."}]
)
async def test_turns_that_say_nothing_are_taken(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, turn: dict[str, Any]
) -> None:
    scheduler.reply = b"x"
    answer = await client.chat("bytes", [USER, {"role": "assistant", **turn}, USER])
    assert answer.message.content == "x"
    assert prompt_of(scheduler) == "<user>hi<assistant><user>hi<assistant>"


PIECES = ("<think>", "Hm.", "</think>", "Well, ", CALL, CALL[:40], "<tool_call>", "\n", "é", "{}", "[1]")


async def test_what_a_model_says_at_random_is_taken_back_streamed_or_not(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory
) -> None:
    scheduler.max_model_len = 100_000
    template = CHATML.replace("m.content", "m | tojson") + "{# tool_calls #}"
    frontend = await start_frontend(
        chat_template=template, tool_call_parser="hermes", reasoning_parser="qwen3"
    )
    client = ollama.AsyncClient(frontend.url)
    chance = random.Random(1)
    messages: list[dict[str, Any]] = [USER]
    for _ in range(25):
        reply = "".join(chance.choices(PIECES, k=chance.randrange(6))).encode()
        scheduler.reply = reply
        options = {"num_predict": chance.randrange(1, len(reply) + 2)}
        stream = chance.random() < 0.5
        asked = await client.chat("bytes", messages, tools=[TOOL], options=options, stream=stream)
        parts = [part.message async for part in asked] if stream else [asked.message]
        calls = [call.model_dump() for part in parts for call in part.tool_calls or ()]
        turn = {
            "role": "assistant",
            "content": "".join(part.content for part in parts),
            "thinking": "".join(part.thinking or "" for part in parts),
            "tool_calls": calls,
        }
        results = [{"role": "tool", "tool_name": "get_weather", "content": "sunny"} for _ in calls]
        messages += [turn, *results, USER]
    assert {"thinking", "tool_calls", "content"} == {
        key for turn in messages if turn["role"] == "assistant" for key, value in turn.items() if value
    } - {"role"}
    await client.close()


async def test_a_last_turn_of_the_model_is_gone_on_with(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b" world"
    await client.chat("bytes", [USER, {"role": "assistant", "content": "Hello,"}])
    assert prompt_of(scheduler) == "<user>hi<assistant>Hello,"


def test_results_are_of_the_calls_that_their_names_or_their_order_say() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {}}}

    turns = [
        {"role": "assistant", "tool_calls": [call("f"), call("g"), {**call("g"), "id": "mine"}]},
        {"role": "tool", "tool_name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "tool_call_id": "mine", "content": "3"},
        {"role": "tool", "tool_name": "h", "content": "4"},
    ]
    calls, *results = for_template([OllamaMessage.model_validate(turn) for turn in turns])
    first, second, third = (each["id"] for each in calls["tool_calls"])
    assert len({first, second, third}) == 3
    assert [(each.get("tool_call_id"), each["name"]) for each in results] == [
        (second, "g"),
        (first, "f"),
        ("mine", "g"),
        (None, "h"),
    ]


def test_calls_are_put_together_until_another_begins() -> None:
    calls = _Calls()
    assert calls.ended_by([ToolCallDelta(0, "a", "f", "{"), ToolCallDelta(0, arguments="}")]) == []
    assert calls.ended_by([ToolCallDelta(1, "b", "g", "")]) == [ToolCallDelta(0, "a", "f", "{}")]
    assert calls.ended() == [ToolCallDelta(1, "b", "g", "")]
    assert calls.ended() == []
