"""pagewire.swift: ms-swift's client functions, where docs/python.md does not show them."""

from __future__ import annotations

import pytest

from pagewire.base.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from pagewire.swift import InferClient, InferRequest, RequestConfig, inference_client
from tools.service import Service

TURNS = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(null_service: Service) -> InferClient:
    return InferClient(base_url=f"{null_service.http_url}/v1")


def test_streamed_answers_are_the_whole_ones_in_pieces(client: InferClient) -> None:
    requests = [InferRequest(messages=TURNS), InferRequest(messages=[*TURNS, *TURNS])]
    whole = client.infer(requests, RequestConfig(max_tokens=8, seed=5))
    streams = client.infer(requests, RequestConfig(max_tokens=8, seed=5, stream=True))
    texts = ["".join(chunk.choices[0].delta.content for chunk in stream) for stream in streams]
    assert texts == [answer.choices[0].message.content for answer in whole]
    assert [answer.usage.completion_tokens for answer in whole] == [8, 8]


def test_errors_are_the_packages_own(null_service: Service, client: InferClient) -> None:
    request = InferRequest(messages=TURNS)
    with pytest.raises(NotFound, match="other"):
        client.infer([request], model="other")
    with pytest.raises(InvalidRequest, match="temperature"):
        client.infer([request], RequestConfig(temperature=-1))
    [stream] = client.infer([request], RequestConfig(temperature=-1, stream=True))
    with pytest.raises(InvalidRequest, match="temperature"):
        next(stream)
    with pytest.raises(InvalidRequest, match="history is not a list"):
        inference_client(null_service.model, "Hi", [("Hi",)])
    with pytest.raises(Unavailable, match=r"no server answers at .*`pagewire serve MODEL`"):
        inference_client("m", "Hi", port=1)
    with pytest.raises(ConfigError, match="base_url is 'localhost:8000'"):
        InferClient(base_url="localhost:8000")
