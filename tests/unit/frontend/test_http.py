"""The OpenAI HTTP API, against a scripted scheduler."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from pagewire.base.errors import Code
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure, stop

CHAT = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, body: object) -> tuple[int, dict]:
    async with http.post(path, json=body) as response:
        return response.status, await response.json()


async def frames(response: aiohttp.ClientResponse) -> list[object]:
    """The decoded server-sent events, "[DONE]" as that string."""
    events = (await response.text()).strip().split("\n\n")
    data = [event.removeprefix("data: ") for event in events]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def test_chat_completion_is_whole(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = "héllo".encode()
    status, body = await post(http, "/v1/chat/completions", {**CHAT, "request_id": "mine"})
    assert status == 200
    assert body["id"] == "chatcmpl-mine"
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "héllo"},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = b"<user>hi<assistant>"
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 7,
        "total_tokens": len(prompt) + 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert bytes(scheduler.submits[0].token_ids) == prompt


async def test_chat_stream_has_role_text_reason_usage_and_done(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = 'a "b"\n☃'.encode()
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        events = await frames(response)
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *chunks, last, usage = events[:-1]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == 'a "b"\n☃'
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len('a "b"\n☃'.encode()) + 1
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
async def test_completion_takes_every_form_of_one_prompt(http, scheduler: ScriptedScheduler, prompt) -> None:
    scheduler.reply = b"xyz"
    status, body = await post(http, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
    assert (status, body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (200, "xy", "length")
    assert list(scheduler.submits[0].token_ids) == [97, 98, 99]


async def test_sampling_fields_reach_the_scheduler(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    given = {
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": -3,
        "max_tokens": 5,
        "min_tokens": 1,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logit_bias": {"5": 2.5},
        "allowed_token_ids": [120, 5],
    }
    fields = {**given, "prompt": "p", "priority": -4, "user": "someone", "skip_special_tokens": False}
    status, _ = await post(http, "/v1/completions", fields)
    assert status == 200
    sampling = scheduler.submits[0].sampling
    for name, value in given.items():
        if name == "logit_bias":
            assert dict(sampling.logit_bias) == {5: 2.5}
        elif isinstance(value, list):
            assert list(getattr(sampling, name)) == value
        else:
            assert getattr(sampling, name) == value
    assert scheduler.submits[0].priority == -4


async def test_seed_is_drawn_and_max_tokens_is_what_the_context_has_left(http, scheduler) -> None:
    scheduler.reply = b"x"
    await post(http, "/v1/chat/completions", CHAT)
    await post(http, "/v1/completions", {"prompt": "12345", "max_tokens": 10_000})
    first, second = (submit.sampling for submit in scheduler.submits)
    assert (first.max_tokens, second.max_tokens) == (200 - len(b"<user>hi<assistant>"), 195)
    assert first.HasField("seed")
    assert first.seed != second.seed


async def test_chat_logprobs_have_openais_shape(http, scheduler: ScriptedScheduler) -> None:
    asking = asyncio.create_task(
        post(http, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})
    )
    submit = await scheduler.submitted()
    assert submit.sampling.logprobs == 2
    entry = pb.TokenLogprobs(logprob=-0.5, top_ids=[97, 98], top_logprobs=[-0.5, -1.5])
    await scheduler.say(submit.handle, [97], logprobs=[entry], end=pb.Ended(reason=pb.END_REASON_LENGTH))
    _, body = await asking
    a = {"token": "a", "logprob": -0.5, "bytes": [97]}
    b = {"token": "b", "logprob": -1.5, "bytes": [98]}
    assert body["choices"][0]["logprobs"]["content"] == [{**a, "top_logprobs": [a, b]}]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_have_openais_shape(http, scheduler: ScriptedScheduler, stream) -> None:
    body = {"prompt": "p", "logprobs": 1, "stream": stream}
    asking = asyncio.create_task(http.post("/v1/completions", json=body))
    submit = await scheduler.submitted()
    entries = [
        pb.TokenLogprobs(logprob=-0.5, top_ids=[98], top_logprobs=[-0.25]),
        pb.TokenLogprobs(logprob=-2, top_ids=[98], top_logprobs=[-2]),
    ]
    end = pb.Ended(reason=pb.END_REASON_LENGTH)
    await scheduler.say(submit.handle, [97, 98], logprobs=entries, end=end)
    response = await asking
    answer = (await frames(response))[0] if stream else await response.json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -2],
        "top_logprobs": [{"b": -0.25, "a": -0.5}, {"b": -2}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_text_and_aborts_the_request(http, scheduler, stream) -> None:
    scheduler.reply = b"one two three four five six"
    scheduler.pause_between_tokens = 0.005
    body = {"prompt": "p", "stop": [" three"], "stream": stream}
    async with http.post("/v1/completions", json=body) as response:
        answers = (await frames(response))[:-1] if stream else [await response.json()]
    assert "".join(answer["choices"][0]["text"] for answer in answers) == "one two"
    assert answers[-1]["choices"][0]["finish_reason"] == "stop"
    if not stream:
        assert answers[0]["usage"]["completion_tokens"] == len("one two three")
    await scheduler.aborted(scheduler.submits[0].handle)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("given", "reason", "stop_reason"),
    [
        ({"stop": ['"', "d"]}, "stop", '"'),
        ({"stop_token_ids": [ord("c")]}, "stop", ord("c")),
        ({"stop_token_ids": [EOS]}, "stop", None),
        ({}, "stop", None),
        ({"max_tokens": 2, "stop": "b"}, "stop", "b"),
        ({"max_tokens": 2, "stop": "c"}, "length", None),
    ],
)
async def test_choices_say_what_stopped_them(
    http,
    scheduler,
    given: dict[str, Any],
    reason: str,
    stop_reason: str | int | None,
    path: str,
    stream: bool,
) -> None:
    scheduler.reply = b'abc"d'
    prompt = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "p"}
    async with http.post(path, json={**prompt, **given, "stream": stream}) as response:
        answers = (await frames(response))[:-1] if stream else [await response.json()]
    *earlier, last = [answer["choices"][0] for answer in answers]
    assert (last["finish_reason"], last["stop_reason"]) == (reason, stop_reason)
    assert not any("stop_reason" in choice for choice in earlier)


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnected_client_aborts_its_request(frontend, scheduler, stream) -> None:
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(session.post("/v1/completions", json={"prompt": "p", "stream": stream}))
        submit = await scheduler.submitted()
        if stream:
            await scheduler.say(submit.handle, [97])
            response = await asking
            assert b"a" in await response.content.readany()
            response.close()
        else:
            asking.cancel()
    await scheduler.aborted(submit.handle)


async def test_refusal_by_the_scheduler_has_its_status_even_when_streaming(http, scheduler) -> None:
    asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p", "stream": True}))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "1024 requests wait"))
    response = await asking
    assert response.status == 429
    assert response.headers["retry-after"] == "1"
    assert (await response.json())["error"]["message"] == "1024 requests wait"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("named", "shown"),
    [("structured_output.regex", "structured_outputs.regex"), ("bad_words", "bad_words"), ("", None)],
)
async def test_refusal_by_the_scheduler_names_the_parameter(http, scheduler, named, shown, stream) -> None:
    body = {"prompt": "p", "structured_outputs": {"regex": "a+"}, "stream": stream}
    asking = asyncio.create_task(http.post("/v1/completions", json=body))
    submit = await scheduler.submitted()
    refusal = failure(Code.INVALID_ARGUMENT, "regex: no tokenizer", named)
    await scheduler.say(submit.handle, [], end=refusal)
    response = await asking
    assert response.status == 400
    assert (await response.json())["error"]["param"] == shown


async def test_error_in_a_stream_is_a_last_frame(http, scheduler) -> None:
    asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p", "stream": True}))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    await scheduler.say(submit.handle, [], end=failure(Code.UNAVAILABLE, "the engine is gone"))
    events = await frames(await asking)
    assert events[0]["choices"][0]["text"] == "a"
    assert events[-1]["error"]["message"] == "the engine is gone"
    assert len(events) == 2


async def test_keys_are_required_once_configured(start_frontend: FrontendFactory, scheduler) -> None:
    scheduler.reply = b"x"
    frontend = await start_frontend(api_keys=("one", "two"))
    async with aiohttp.ClientSession(frontend.url) as session:
        for headers, expected in (
            ({}, 401),
            ({"authorization": "Bearer three"}, 401),
            ({"authorization": "Bearer two"}, 200),
            ({"x-api-key": "one"}, 200),
        ):
            async with session.post("/v1/completions", json={"prompt": "p"}, headers=headers) as response:
                assert response.status == expected
                if expected == 401:
                    assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with session.get("/health") as response:
            assert response.status == 200


async def test_operational_endpoints(http, frontend: RunningFrontend) -> None:
    async with http.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["bytes"]
    async with http.get("/v1/models/bytes") as response:
        assert (await response.json())["max_model_len"] == 200
    async with http.get("/metrics") as response:
        text = await response.text()
        assert "pagewire:num_requests_running 3.0" in text
        assert f'pagewire:frontend_scheduler_ready{{frontend="{frontend.metrics.frontend}"}} 1.0' in text
    for path in ("/health", "/ready", "/version", "/"):
        async with http.get(path) as response:
            assert response.status == 200
    status, tokens = await post(http, "/tokenize", {"prompt": "hé"})
    expected = {"tokens": [104, 195, 169], "count": 3, "max_model_len": 200, "token_strs": None}
    assert (status, tokens) == (200, expected)
    status, text = await post(http, "/detokenize", {"tokens": [104, 195, 169]})
    assert (status, text) == (200, {"prompt": "hé"})


async def test_request_id_is_in_every_answer(http) -> None:
    for path, expected in (("/health", 200), ("/nowhere", 404)):
        async with http.get(path, headers={"x-request-id": "abc-1"}) as response:
            assert (response.status, response.headers["x-request-id"]) == (expected, "abc-1")


async def test_draining_refuses_new_requests_and_finishes_open_ones(http, frontend, scheduler) -> None:
    asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p"}))
    submit = await scheduler.submitted()
    draining = asyncio.create_task(frontend.pipeline.drain(5))
    await asyncio.sleep(0)
    status, body = await post(http, "/v1/completions", {"prompt": "late"})
    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
    async with http.get("/ready") as response:
        assert response.status == 503
    await scheduler.say(submit.handle, [97, EOS], end=stop(EOS))
    assert (await (await asking).json())["choices"][0]["text"] == "a"
    await asyncio.wait_for(draining, 1)


async def test_drain_that_takes_too_long_ends_requests_as_aborted(http, frontend, scheduler) -> None:
    asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p"}))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    await frontend.pipeline.drain(0.1)
    body = await (await asking).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("a", "abort")


@pytest.mark.parametrize("was_there", [False, True])
async def test_draining_waits_for_an_engine_that_was_lost_and_for_no_first_one(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, was_there: bool
) -> None:
    scheduler.ready, scheduler.reply = was_there, b"x"
    frontend = await start_frontend(wait=was_there)
    await scheduler.until(lambda scheduler: scheduler.num_streams == 1)
    if was_there:
        await scheduler.lose_engine()
    while frontend.link.ready:
        await asyncio.sleep(0.01)
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(post(session, "/v1/completions", {"prompt": "p"}))
        while not frontend.pipeline.num_open:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(frontend.pipeline.drain(10))
        if not was_there:
            status, body = await asyncio.wait_for(asking, 5)
            assert (status, body["error"]["code"]) == (503, "engine_unavailable")
            assert body["error"]["message"] == "this server is shutting down, and has no engine"
        else:
            await asyncio.sleep(0.05)
            await scheduler.attach_engine()
            status, body = await asyncio.wait_for(asking, 5)
            assert (status, body["choices"][0]["text"]) == (200, "x")
        await asyncio.wait_for(draining, 1)


async def test_what_needs_no_engine_works_without_one(start_frontend: FrontendFactory, scheduler) -> None:
    scheduler.ready = False
    frontend = await start_frontend(wait=False, reconnect_timeout=0.1)
    await scheduler.until(lambda scheduler: scheduler.num_streams == 1)
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/ready") as response:
            assert response.status == 503
        status, body = await post(session, "/v1/completions", {"prompt": "p"})
        assert (status, body["error"]["code"]) == (503, "engine_unavailable")
        assert await post(session, "/detokenize", {"tokens": [104]}) == (200, {"prompt": "h"})
        async with session.get("/v1/models/bytes") as response:
            assert (await response.json())["max_model_len"] is None
