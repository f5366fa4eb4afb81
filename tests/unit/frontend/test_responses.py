"""The Responses API, through the official client and by its bytes, against a scripted scheduler."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from frontend.generation.completion import Usage
from frontend.generation.events import Delta, Finished, FinishReason
from frontend.generation.message_parser import ToolCallDelta
from frontend.http.body import parse
from frontend.http.openai.response_shape import ResponseBuilder
from frontend.http.openai.schemas.answers import ResponseAnswer, ResponseEvent
from frontend.http.openai.schemas.responses import ResponsesBody
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import Code
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler, failure

URL = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


@pytest.fixture
async def client(frontend: RunningFrontend):
    async with openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="-", max_retries=0) as client:
        yield client


async def post(http: aiohttp.ClientSession, **body: object) -> tuple[int, dict]:
    async with http.post(URL, json=body) as response:
        return response.status, await response.json()


async def test_text_in_text_out(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = "héllo".encode()
    response = await client.responses.create(
        model="bytes",
        input="hi",
        instructions="Be brief.",
        metadata={"a": "b"},
        max_output_tokens=50,
        user="me",
    )
    assert bytes(scheduler.submits[0].token_ids) == b"<system>Be brief.<user>hi<assistant>"
    assert scheduler.submits[0].sampling.max_tokens == 50
    assert (response.status, response.output_text) == ("completed", "héllo")
    assert response.id.startswith("resp_")
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.input_tokens == len(b"<system>Be brief.<user>hi<assistant>")
    assert response.usage.output_tokens == 7
    assert (response.metadata, response.instructions, response.user) == ({"a": "b"}, "Be brief.", "me")
    assert (response.store, response.previous_response_id, response.truncation) == (False, None, "disabled")


async def test_stream_has_every_event_in_order(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"abc"
    stream = await client.responses.create(model="bytes", input="hi", stream=True)
    events = [event async for event in stream]
    kinds = [event.type.removeprefix("response.") for event in events]
    num_deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * num_deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "abc"
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert events[-1].response.output_text == "abc"


async def test_clients_stream_helper_follows(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"abc"
    async with client.responses.stream(model="bytes", input="hi") as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == "abc"


async def test_frames_name_their_type_and_need_no_done(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    async with http.post(URL, json={"input": "hi", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = (await response.text()).strip().split("\n\n")
    for frame in frames:
        kind, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        TypeAdapter(ResponseEvent).validate_python(event, strict=True)


async def test_cut_off_answer_is_incomplete(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"abcdef"
    response = await client.responses.create(model="bytes", input="hi", max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "abc")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    stream = await client.responses.create(model="bytes", input="hi", max_output_tokens=3, stream=True)
    assert [event async for event in stream][-1].type == "response.incomplete"


async def test_answer_without_a_word_is_an_empty_message(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b""
    response = await client.responses.create(model="bytes", input="hi")
    assert (response.status, response.output[0].content[0].text) == ("completed", "")


async def test_logprobs_come_with_include(client, scheduler: ScriptedScheduler) -> None:
    for stream in (False, True):
        asking = asyncio.create_task(
            client.responses.create(
                model="bytes",
                input="hi",
                include=["message.output_text.logprobs"],
                top_logprobs=1,
                stream=stream,
            )
        )
        submit = await scheduler.submitted(1 + stream)
        assert submit.sampling.logprobs == 1
        entry = pb.TokenLogprobs(logprob=-0.5, top_ids=[98], top_logprobs=[-0.25])
        await scheduler.say(submit.handle, [97], logprobs=[entry], end=pb.Ended(reason=pb.END_REASON_LENGTH))
        answer = await asking
        response = [event async for event in answer][-1].response if stream else answer
        [logprob] = response.output[0].content[0].logprobs
        assert (logprob.token, logprob.logprob, logprob.bytes) == ("a", -0.5, [97])
        assert [(top.token, top.logprob) for top in logprob.top_logprobs] == [("b", -0.25)]


async def test_a_whole_conversation_becomes_turns(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    given = [
        {"role": "system", "content": "D"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
        },
        {"type": "message", "role": "user", "content": "d"},
    ]
    status, _ = await post(http, input=given, instructions="I")
    assert status == 200
    assert bytes(scheduler.submits[0].token_ids) == b"<system>I\n\nD<user>ab<assistant>c<user>d<assistant>"


async def test_answers_can_be_sent_back_as_they_came(client, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"one"
    first = await client.responses.create(model="bytes", input="hi")
    given: list[Any] = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "more"}]
    await client.responses.create(model="bytes", input=given)
    assert bytes(scheduler.submits[1].token_ids) == b"<user>hi<assistant>one<user>more<assistant>"


def items(given: list[dict[str, Any]], **fields: object) -> list[dict[str, Any]]:
    body = parse(ResponsesBody, json.dumps({"input": given, **fields}).encode())
    return list(body.to_converse().messages)


def test_thoughts_words_and_calls_of_one_go_are_one_turn() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Bonn"}'}
    output = {"type": "function_call_output", "call_id": "1", "output": "rain"}
    thoughts = {
        "type": "reasoning",
        "id": "r",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    said = {"role": "assistant", "content": "Let me see."}
    assert items([{"role": "user", "content": "q"}, thoughts, said, call, output, said]) == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Bonn"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Let me see."},
    ]


def test_tools_and_choices_are_understood() -> None:
    def conversation(**fields: object):
        return parse(
            ResponsesBody, json.dumps({"input": "q", "tools": [WEATHER], **fields}).encode()
        ).to_converse()

    assert conversation().tools[0].for_template()["function"] == {
        "name": "weather",
        "parameters": WEATHER["parameters"],
    }
    assert conversation().tool_choice.kind == "auto"
    assert conversation(tool_choice="required").tool_choice.kind == "required"
    named = conversation(tool_choice={"type": "function", "name": "weather"}).tool_choice
    assert (named.kind, named.name) == ("named", "weather")
    other = {**WEATHER, "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    assert [tool.name for tool in conversation(tools=[WEATHER, other], tool_choice=allowed).tools] == [
        "other"
    ]
    assert conversation(parallel_tool_calls=False).parallel_tool_calls is False
    assert conversation(reasoning={"effort": "low"}).template_variables == {"reasoning_effort": "low"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "must provide input"),
    ({"input": 5}, "input must be a string or a list of items"),
    ({"input": []}, "messages has 0 entries"),
    ({"input": "q", "previous_response_id": "resp_1"}, "stores no responses"),
    ({"input": "q", "conversation": "conv_1"}, "stores no responses"),
    ({"input": "q", "prompt": {"id": "x"}}, "stores no responses"),
    ({"input": "q", "background": True}, "background is true"),
    ({"input": "q", "foo": 1}, "Unrecognized request argument supplied: foo"),
    ({"input": [{"role": "user", "content": "q", "foo": 1}]}, "supplied: input[0].foo"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "its type must be message, function_call"),
    ({"input": [{"role": "wizard", "content": "q"}]}, "input[0].role is wrong"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_text"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "provide input[0].content[0].text",
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]},
        "answers the call '1'",
    ),
    ({"input": "q", "tools": [{"type": "web_search"}]}, "no tools of its own"),
    ({"input": "q", "tools": [{"type": "function", "name": "a b"}]}, "letters, digits"),
    ({"input": "q", "tool_choice": "required"}, "it needs tools"),
    ({"input": "q", "tool_choice": "sometimes"}, "tool_choice"),
    ({"input": "q", "tool_choice": {"type": "mcp"}}, "it must be none, auto, required"),
    (
        {"input": "q", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
        "allows no tool",
    ),
    (
        {"input": "q", "text": {"format": {"type": "json_schema", "name": "x"}}},
        "text.format.schema is missing",
    ),
    ({"input": "q", "text": {"verbosity": "loud"}}, "text.verbosity is wrong"),
    ({"input": "q", "reasoning": {"summary": "detailed"}}, "not summarised"),
    ({"input": "q", "include": ["file_search_call.results"]}, "include has"),
    ({"input": "q", "stream_options": {}}, "only allowed with stream"),
    ({"input": "q", "metadata": {"k": "v" * 600}}, "metadata may have at most"),
    ({"input": "q", "metadata": {"k": 1}}, "metadata.k is wrong"),
    ({"input": "q", "max_output_tokens": 0}, "max_output_tokens is 0"),
    ({"input": "q", "temperature": 3e38, "top_p": 7}, "top_p is 7"),
    ({"input": "q", "truncation": "maybe"}, "truncation"),
    ({"input": "q", "service_tier": "best"}, "service_tier is wrong"),
    ({"input": "x" * 500}, "at most 199"),
]


async def test_bad_requests_are_named(http, scheduler) -> None:
    for body, part in BAD:
        status, answer = await post(http, **body)
        assert (status, part in answer["error"]["message"]) == (400, True), answer
    assert scheduler.submits == []


async def test_nothing_is_stored(client) -> None:
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            await call("resp_1")


async def test_truncation_drops_the_oldest_turns_and_keeps_the_system(http, scheduler) -> None:
    """The context has 200 tokens, one a byte."""
    scheduler.reply = b"x"
    turns = [
        {"role": "system", "content": "S"},
        *(
            {"role": role, "content": str(number) * 30}
            for number in range(4)
            for role in ("user", "assistant")
        ),
        {"role": "user", "content": "last"},
    ]
    status, _ = await post(http, input=turns)
    assert status == 400
    status, answer = await post(http, input=turns, truncation="auto", max_output_tokens=30)
    assert (status, answer["truncation"]) == (200, "auto")
    sent = bytes(scheduler.submits[0].token_ids).decode()
    threes = "3" * 30
    assert sent == f"<system>S<user>{threes}<assistant>{threes}<user>last<assistant>"
    status, _ = await post(http, input="x" * 500, truncation="auto")
    assert status == 400


async def test_refusal_before_the_first_event_has_its_status(http, scheduler: ScriptedScheduler) -> None:
    asking = asyncio.create_task(http.post(URL, json={"input": "q", "stream": True}))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "1024 requests wait"))
    assert (await asking).status == 429


async def test_failure_in_a_stream_is_its_last_event(client, scheduler: ScriptedScheduler) -> None:
    stream = asyncio.create_task(client.responses.create(model="bytes", input="q", stream=True))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    events = [event async for event in _failing(await stream, scheduler, submit.handle)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the engine is gone"
    assert events[-1].response.output_text == "a"


async def _failing(stream: Any, scheduler: ScriptedScheduler, handle: int):
    async for event in stream:
        if event.type == "response.output_text.delta":
            await scheduler.say(handle, [], end=failure(Code.UNAVAILABLE, "the engine is gone"))
        yield event


async def test_disconnected_client_aborts_its_request(frontend, scheduler) -> None:
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(session.post(URL, json={"input": "q"}))
        submit = await scheduler.submitted()
        asking.cancel()
        await scheduler.aborted(submit.handle)


def built(deltas: list[Delta], reason: FinishReason, **fields: object) -> tuple[list[dict], dict]:
    """What a builder makes of some deltas, held to the official client's models and to ours."""
    body = parse(ResponsesBody, json.dumps({"input": "q", **fields}).encode())
    builder = ResponseBuilder(
        body, SamplingParams(), request_id="r", model="m", tokenizer=TextTokenizer.without_text()
    )
    events = builder.begin()
    for delta in deltas:
        events += builder.add(delta)
    events += builder.end(Finished(reason, Usage(3, 1, 5)), 2)
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        TypeAdapter(ResponseEvent).validate_python(event, strict=True)
    Response.model_validate(builder.response)
    ResponseAnswer.model_validate(builder.response, strict=True)
    return events, builder.response


def delta(text: str = "", reasoning: str = "", *calls: ToolCallDelta) -> Delta:
    return Delta([], text, [], Usage(3, 1, 5), reasoning=reasoning, tool_calls=calls)


def test_thoughts_text_and_calls_are_items_of_their_own() -> None:
    events, response = built(
        [
            delta(reasoning="hm"),
            delta(reasoning="m", text="So"),
            delta(text="."),
            delta("", "", ToolCallDelta(0, "call_1", "weather", "")),
            delta("", "", ToolCallDelta(0, arguments='{"city":')),
            delta("", "", ToolCallDelta(0, arguments=' "Bonn"}'), ToolCallDelta(1, "call_2", "time", "{}")),
        ],
        FinishReason.TOOL_CALLS,
        tools=[WEATHER, {"type": "function", "name": "time"}],
    )
    thoughts, message, weather, clock = response["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert message["content"][0]["text"] == "So."
    assert (weather["call_id"], weather["name"], weather["arguments"]) == (
        "call_1",
        "weather",
        '{"city": "Bonn"}',
    )
    assert (clock["call_id"], clock["arguments"]) == ("call_2", "{}")
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert len({item["id"] for item in response["output"]}) == 4
    assert response["status"] == "completed"
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    of_weather = [event["type"] for event in events if event.get("item_id") == weather["id"]]
    assert of_weather == [
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.added"] == [
        0,
        1,
        2,
        3,
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_only_the_item_that_was_cut_off_is_incomplete() -> None:
    _, response = built(
        [delta(text="So."), delta("", "", ToolCallDelta(0, "c", "weather", '{"ci'))],
        FinishReason.LENGTH,
        tools=[WEATHER],
    )
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["status"] == "incomplete"


def test_a_drained_server_fails_its_responses() -> None:
    events, response = built([delta(text="So")], FinishReason.ABORT)
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert events[-1]["type"] == "response.failed"
