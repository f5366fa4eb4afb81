"""Every kind of bad input gets a clear typed error, on both protocols, and disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest

from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.scheduler.v1 import scheduler_pb2
from tests.unit.frontend.conftest import RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "a"}}


BAD_COMPLETIONS = {
    "unknown model": ({"prompt": "p", "model": "other"}, 404, "model_not_found", "'other' does not exist"),
    "long prompt": ({"prompt": "p" * 300}, 400, None, "has 300 tokens; at most 199 fit"),
    "empty prompt": ({"prompt": ""}, 400, None, "prompt is empty"),
    "empty token list": ({"prompt": []}, 400, None, "list of 0 prompts"),
    "no prompt": ({}, 400, None, "must provide prompt"),
    "empty prompt of two": ({"prompt": ["a", ""]}, 400, None, "prompt is empty"),
    "many prompts": ({"prompt": ["a"] * 600, "n": 2}, 400, None, "are 1200; a request may have at most 1024"),
    "mixed prompt": ({"prompt": [1, "b"]}, 400, None, "prompt must be a string"),
    "temperature": (
        {"prompt": "p", "temperature": -1},
        400,
        None,
        "temperature is -1.0; it must be at",
    ),
    "infinite temperature": ({"prompt": "p", "temperature": 1e300}, 400, None, "32-bit float"),
    "max_tokens": ({"prompt": "p", "max_tokens": 0}, 400, None, "max_tokens is 0; it must be at least 1"),
    "max_tokens as text": ({"prompt": "p", "max_tokens": "5"}, 400, None, "max_tokens is wrong"),
    "min_tokens": ({"prompt": "p" * 190, "min_tokens": 11}, 400, None, "at most 10 can be generated"),
    "token id": ({"prompt": [1, 257]}, 400, None, "token id 257; ids must be between 0 and 256"),
    "negative token id": ({"prompt": [-1]}, 400, None, "token id -1"),
    "bias token id": ({"prompt": "p", "logit_bias": {"999": 1}}, 400, None, "token id 999"),
    "bias key": ({"prompt": "p", "logit_bias": {"x": 1}}, 400, None, "logit_bias"),
    "empty stop": ({"prompt": "p", "stop": [""]}, 400, None, "stop is"),
    "unknown field": ({"prompt": "p", "foo": 1}, 400, None, "Unrecognized request argument supplied: foo"),
    "n": ({"prompt": "p", "n": 0}, 400, None, "n is 0; it must be between 1 and 128"),
    "best_of": ({"prompt": "p", "n": 3, "best_of": 2}, 400, None, "best_of is 2; it must be at least n (3)"),
    "beams": ({"prompt": "p", "use_beam_search": True, "n": 11}, 400, None, "n is 11; with beam search"),
    "beams with bias": (
        {"prompt": "p", "use_beam_search": True, "n": 2, "logit_bias": {"1": 1}},
        400,
        None,
        "unset with beam search",
    ),
    "length_penalty alone": ({"prompt": "p", "length_penalty": 2.0}, 400, None, "needs use_beam_search"),
    "prompt_logprobs": ({"prompt": "p", "prompt_logprobs": 21}, 400, None, "between 0 and 20"),
    "truncation": ({"prompt": "p", "truncate_prompt_tokens": 0}, 400, None, "truncate_prompt_tokens is 0"),
    "no allowed token": (
        {"prompt": "p", "allowed_token_ids": []},
        400,
        None,
        "allowed_token_ids is empty, which allows no token; it must be left out",
    ),
    "cache_salt": ({"prompt": "p", "cache_salt": "x" * 257}, 400, None, "cache_salt has 257 characters"),
    "bad word": ({"prompt": "p", "bad_words": [""]}, 400, None, "bad_words is a string of 0"),
    "constraint": (
        {"prompt": "p", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        400,
        None,
        "type",
    ),
    "two constraints": (
        {"prompt": "p", "guided_regex": "a", "guided_choice": ["b"]},
        400,
        None,
        "an answer can have one constraint",
    ),
    "suffix": ({"prompt": "p", "suffix": "s"}, 400, "unsupported_parameter", "suffix is not supported"),
    "stream option": (
        {"prompt": "p", "stream": True, "stream_options": {"x": 1}},
        400,
        None,
        "Unrecognized request argument supplied: stream_options.x",
    ),
    "no time": ({"prompt": "p", "timeout": 0}, 400, None, "timeout is wrong: Input should be greater than 0"),
    "deadline": ({"prompt": "p", "timeout": 1e-9}, 408, "deadline_exceeded", "deadline passed"),
    "request id": ({"prompt": "p", "request_id": "x" * 200}, 400, None, "request_id must be"),
    "priority": ({"prompt": "p", "priority": 2**31}, 400, None, "signed 32-bit"),
}
BAD_CHATS = {
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role is 'wizard'"),
    "no messages": ({"messages": []}, "messages has 0 entries"),
    "no content": ({"messages": [{"role": "user"}]}, "must provide messages[0].content"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0] is wrong: it must be text",
    ),
    "unknown field in a message": ({"messages": [{**USER, "foo": 1}]}, "supplied: messages[0].foo"),
    "half a tool": ({"messages": [USER], "tools": [{"type": "function"}]}, "must provide tools[0].function"),
    "unnamed tool": (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]},
        "name is 'a b'; it must be 1 to 128 letters",
    ),
    "unstrict tool": (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]},
        "tools[0].function.strict is 1",
    ),
    "choice of nothing": ({"messages": [USER], "tool_choice": "required"}, "it needs tools"),
    "unknown choice": (
        {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice names 'b'; the tools are 'a'",
    ),
    "misspelt choice": ({"messages": [USER], "tools": [TOOL], "tool_choice": "must"}, "tool_choice is wrong"),
    "choice of allowed tools": (
        {
            "messages": [USER],
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "z"}}]},
            },
        },
        "allowed_tools.tools names z",
    ),
    "choice and format": (
        {
            "messages": [USER],
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "cannot be combined with response_format",
    ),
    "own template": ({"messages": [USER], "chat_template": "x"}, "--trust-request-chat-template"),
    "own variables": (
        {"messages": [USER], "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs has 'messages'",
    ),
    "two ends": (
        {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
        "set one of them",
    ),
    "top_logprobs alone": ({"messages": [USER], "top_logprobs": 2}, "needs logprobs: true"),
    "too many logprobs": ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "between 0 and 20"),
    "stream_options": ({"messages": [USER], "stream_options": {}}, "only allowed with stream"),
    "two limits": ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "differ"),
}


@pytest.fixture
async def http(frontend: RunningFrontend) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


@pytest.fixture
async def channel(frontend: RunningFrontend) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        yield channel


@pytest.fixture(autouse=True)
async def running_stream(frontend: RunningFrontend, scheduler: ScriptedScheduler) -> AsyncIterator[None]:
    """A stream that is open before and during each test, and whole after it."""
    async with AsyncClient(frontend.target) as client:
        stream = client.generate("beside", stream=True)
        first = asyncio.ensure_future(anext(stream))
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, b"12")
        text = (await first).text
        yield
        await scheduler.say(
            submit.handle, b"34", end=scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_LENGTH)
        )
        async for delta in stream:
            text += delta.text
        assert text == "1234"
        # A call whose deadline passes while it is on its way may get there, with the little that is left.
        others = [
            submit
            for submit in scheduler.submits[1:]
            if not (submit.HasField("timeout") and submit.timeout < 0.1)
        ]
        assert not others, "a bad request reached the scheduler"


async def refused(
    http: aiohttp.ClientSession, path: str, status: int, part: str, **body: object
) -> dict[str, object]:
    async with http.post(path, **body) as response:
        error = (await response.json())["error"]
        assert (response.status, set(error)) == (status, {"message", "type", "param", "code"})
        assert part in error["message"]
        assert response.headers["x-request-id"]
        return error


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_completions_over_http(http, case: str, stream: bool) -> None:
    body, status, code, part = BAD_COMPLETIONS[case]
    error = await refused(http, "/v1/completions", status, part, json={**body, "stream": stream})
    assert error["code"] == code


@pytest.mark.parametrize("case", BAD_CHATS)
async def test_bad_chats_over_http(http, case: str) -> None:
    body, part = BAD_CHATS[case]
    await refused(http, "/v1/chat/completions", 400, part, json=body)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_bodies_that_are_no_json_over_http(http, path: str) -> None:
    await refused(http, path, 400, "not valid JSON", data=b'{"prompt": ')
    await refused(http, path, 400, "not valid JSON", data=b'{"prompt": "\xff\xfe"}')
    await refused(http, path, 400, "not valid JSON", data=b'{"prompt": "\\ud800"}')
    await refused(http, path, 400, "not valid JSON", data=b"")
    await refused(http, path, 400, "must be a JSON object", data=b"[]")


async def test_large_bodies_over_http(http) -> None:
    body = b'{"prompt": "' + b"a" * 20_000_000 + b'"}'
    await refused(http, "/v1/completions", 413, "at most 8388608", data=body)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    error = await refused(http, "/v1/completions", 413, "Maximum request body size", data=pieces())
    assert error["code"] == "request_too_large"


async def test_unknown_paths_and_methods_over_http(http) -> None:
    await refused(http, "/v1/nothing", 404, "no such path", json={})
    async with http.get("/v1/completions") as response:
        assert (response.status, response.headers["allow"]) == (405, "POST")
        assert "allowed: POST" in (await response.json())["error"]["message"]
    async with http.get("/v1/models/other") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


def tokens(*ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))


def sampled(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="p", sampling=pb.SamplingParams(**fields))


BAD_MESSAGES = {
    "unknown model": (pb.GenerateRequest(text="p", model="other"), "NOT_FOUND", "'other' does not exist"),
    "long name": (pb.GenerateRequest(text="p", model="é" * 9000), "NOT_FOUND", "the model 'é"),
    "long prompt": (tokens(*[1] * 300), "INVALID_ARGUMENT", "has 300 tokens; at most 199 fit"),
    "empty prompt": (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "prompt is empty"),
    "empty token list": (tokens(), "INVALID_ARGUMENT", "prompt is empty"),
    "no prompt": (pb.GenerateRequest(), "INVALID_ARGUMENT", "no prompt"),
    "temperature": (sampled(temperature=-1), "INVALID_ARGUMENT", "temperature is -1.0"),
    "NaN": (sampled(temperature=float("nan")), "INVALID_ARGUMENT", "temperature is nan"),
    "max_tokens": (sampled(max_tokens=0), "INVALID_ARGUMENT", "max_tokens is 0"),
    "n": (sampled(n=129), "INVALID_ARGUMENT", "n is 129"),
    "beam width": (
        sampled(beam_search=pb.BeamSearch(width=11)),
        "INVALID_ARGUMENT",
        "beam_search.width is 11",
    ),
    "empty constraint": (
        sampled(structured_output=pb.StructuredOutput()),
        "INVALID_ARGUMENT",
        "structured_output is empty",
    ),
    "token id": (tokens(1, 257), "INVALID_ARGUMENT", "token id 257"),
    "stop token id": (sampled(stop_token_ids=[257]), "INVALID_ARGUMENT", "token id 257"),
    "unknown role": (
        pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(role="wizard")])),
        "INVALID_ARGUMENT",
        "messages[0].role is 'wizard'",
    ),
    "no messages": (pb.GenerateRequest(messages=pb.ChatMessages()), "INVALID_ARGUMENT", "0 entries"),
    "deadline": (pb.GenerateRequest(text="p", timeout=-1), "DEADLINE_EXCEEDED", "deadline had passed"),
    "NaN deadline": (
        pb.GenerateRequest(text="p", timeout=float("nan")),
        "INVALID_ARGUMENT",
        "timeout is nan",
    ),
    "request id": (pb.GenerateRequest(text="p", request_id="a\nb"), "INVALID_ARGUMENT", "request_id must be"),
    "large message": (pb.GenerateRequest(text="a" * 20_000_000), "RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
async def test_bad_messages_over_grpc(channel, case: str) -> None:
    request, status, part = BAD_MESSAGES[case]
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for call in (stub.GenerateOnce(request), stub.Generate(request).read()):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code().name == status
        assert part in raised.value.details()


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce", "Tokenize"])
async def test_text_that_is_no_utf8_over_grpc(channel, method: str) -> None:
    """A string field with the bytes FF FE: field 3 of GenerateRequest, field 2 of TokenizeRequest."""
    path = f"/pagewire.inference.v1.InferenceService/{method}"
    text = bytes([(2 if method == "Tokenize" else 3) << 3 | 2, 2, 0xFF, 0xFE])
    for data in (text, b"\xff\xff\xff"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(path)(data)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no valid protobuf message" in raised.value.details()


async def test_call_whose_deadline_has_passed_over_grpc(channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GenerateOnce(pb.GenerateRequest(text="p"), timeout=0)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
