"""Bad input against a real server, on both protocols, beside a stream that must not notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from pagewire import Client, SamplingParams
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

BESIDE = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = "A long story about a lighthouse keeper:"

BODIES = {
    "unknown model": ({"prompt": "p", "model": "other"}, 404, "does not exist"),
    "over-long prompt": ({"prompt": [1] * 200_000}, 400, "the prompt has 200000 tokens; at most"),
    "empty prompt": ({"prompt": ""}, 400, "the prompt is empty"),
    "temperature -1": ({"prompt": "p", "temperature": -1}, 400, "temperature is -1"),
    "max_tokens 0": ({"prompt": "p", "max_tokens": 0}, 400, "max_tokens is 0"),
    "token id out of range": ({"prompt": [49152]}, 400, "token id 49152"),
    "no time": ({"prompt": "p", "timeout": 0}, 400, "timeout is wrong"),
}
DATA = {
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, "not valid JSON in UTF-8"),
    "20 MB body": (b'{"prompt": "' + b"a" * 20_000_000 + b'"}', 413, "at most"),
    "malformed JSON": (b'{"prompt": "p"', 400, "not valid JSON"),
}
MESSAGES = {
    "unknown model": (pb.GenerateRequest(text="p", model="other"), "NOT_FOUND", "does not exist"),
    "over-long prompt": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 200_000)),
        "INVALID_ARGUMENT",
        "the prompt has 200000 tokens; at most",
    ),
    "empty prompt": (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "the prompt is empty"),
    "temperature -1": (
        pb.GenerateRequest(text="p", sampling=pb.SamplingParams(temperature=-1)),
        "INVALID_ARGUMENT",
        "temperature is -1",
    ),
    "max_tokens 0": (
        pb.GenerateRequest(text="p", sampling=pb.SamplingParams(max_tokens=0)),
        "INVALID_ARGUMENT",
        "max_tokens is 0",
    ),
    "token id out of range": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[49152])),
        "INVALID_ARGUMENT",
        "token id 49152",
    ),
    "unknown role": (
        pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(role="wizard", content="x")])),
        "INVALID_ARGUMENT",
        "role is 'wizard'",
    ),
    "20 MB message": (pb.GenerateRequest(text="a" * 20_000_000), "RESOURCE_EXHAUSTED", "larger than max"),
    "deadline already passed": (
        pb.GenerateRequest(text="p", timeout=0),
        "DEADLINE_EXCEEDED",
        "deadline had passed",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def stream_beside(server: Any) -> Iterator[None]:
    """Streams that run, one after another, for as long as the module's tests do; each must be what it is
    alone."""
    with Client(server.grpc_target) as client:
        expected = client.generate(PROMPT, BESIDE).text
        done = threading.Event()
        texts: list[str] = []
        failures: list[Exception] = []

        def keep_streaming() -> None:
            try:
                while not done.is_set() or not texts:
                    texts.append(
                        "".join(delta.text for delta in client.generate(PROMPT, BESIDE, stream=True))
                    )
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=keep_streaming)
        thread.start()
        yield
        done.set()
        thread.join()
        assert not failures
        assert set(texts) == {expected}


def check_http(response: httpx.Response, status: int, part: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert part in error["message"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("case", BODIES)
def test_http_refuses(server: Any, case: str) -> None:
    body, status, part = BODIES[case]
    check_http(httpx.post(f"{server.http_url}/v1/completions", json=body), status, part)


@pytest.mark.parametrize("case", DATA)
def test_http_refuses_bytes(server: Any, case: str) -> None:
    data, status, part = DATA[case]
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.http_url}/v1/completions", content=data, headers=headers)
    check_http(response, status, part)


def test_http_refuses_an_unknown_role(server: Any) -> None:
    body = {"messages": [{"role": "wizard", "content": "x"}]}
    response = httpx.post(f"{server.http_url}/v1/chat/completions", json=body)
    check_http(response, 400, "messages[0].role is 'wizard'")


@pytest.fixture
def channel(server: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


@pytest.mark.parametrize("case", MESSAGES)
def test_grpc_refuses(channel: grpc.Channel, case: str) -> None:
    request, status, part = MESSAGES[case]
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for call in (stub.GenerateOnce, lambda request: next(stub.Generate(request))):
        with pytest.raises(grpc.RpcError) as raised:
            call(request)
        assert raised.value.code().name == status
        assert part in raised.value.details()


@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe", b"\xff\xff\xff"], ids=["invalid UTF-8", "no message"])
def test_grpc_refuses_bytes(channel: grpc.Channel, data: bytes) -> None:
    method = channel.unary_unary("/pagewire.inference.v1.InferenceService/GenerateOnce")
    with pytest.raises(grpc.RpcError) as raised:
        method(data)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_grpc_refuses_a_call_whose_deadline_has_passed(channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        stub.GenerateOnce(pb.GenerateRequest(text="p"), timeout=0)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_body_that_is_not_what_its_encoding_says_is_a_400(server: Any) -> None:
    answer = httpx.post(
        f"{server.http_url}/v1/completions",
        content=b"not gzip",
        headers={"content-encoding": "gzip", "content-type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 400
    assert "is not the gzip that its header says" in answer.json()["error"]["message"]


def test_a_text_far_too_long_is_refused_without_tokenizing_it(server: Any) -> None:
    answer = httpx.post(f"{server.http_url}/v1/completions", json={"prompt": "a " * 3_500_000}, timeout=60)
    assert answer.status_code == 400
    assert "characters, which is more than" in answer.json()["error"]["message"]
