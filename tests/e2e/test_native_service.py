"""The default service computes on a GGUF file as it is: weights in the file's blocks, by native kernels."""

from __future__ import annotations

import json
import math
from urllib.request import urlopen

import grpc
import openai
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.client import complete_all, tokens
from tools.service import Service

STORY = "Once upon a time there was a lighthouse keeper who counted ships. Every evening he wrote down"


@pytest.fixture
def service(server: Service) -> Service:
    if "torch computes everything" in server.log:
        pytest.skip("the native kernels cannot be compiled here")
    return server


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.http_url}/v1", api_key="-", max_retries=0, timeout=120)


def request(text: str = STORY, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**{"temperature": 0, **sampling}))


def test_it_says_what_computes(service: Service) -> None:
    with urlopen(f"{service.http_url}/server_info") as answer:
        engine = json.load(answer)["engine"]
    assert engine["kernels"].startswith("native ")
    assert "Q4_1" in engine["weights"]


def test_it_answers_sensibly(client: openai.OpenAI, service: Service) -> None:
    messages = [{"role": "user", "content": "Name the capital of France. Answer in one sentence."}]
    answer = client.chat.completions.create(
        model=service.model, messages=messages, max_tokens=40, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content


async def test_many_at_once_get_prefix_hits_and_the_same_tokens(service: Service) -> None:
    """Rows of a batch do not depend on each other."""
    (alone,) = await complete_all(service.grpc_target, [request(max_tokens=12, ignore_eos=True)], 1)
    several = await complete_all(service.grpc_target, [request(max_tokens=12, ignore_eos=True)] * 10, 10)
    assert {tuple(each) for each in tokens(several)} == {tuple(tokens([alone])[0])}
    assert all(each.finished.usage.cached_tokens > 0 for each in several)
    assert len(tokens([alone])[0]) == 12


def test_log_probabilities_are_distributions(client: openai.OpenAI, service: Service) -> None:
    answer = client.completions.create(
        model=service.model, prompt=STORY, max_tokens=8, temperature=0, logprobs=5
    )
    for token, top in zip(
        answer.choices[0].logprobs.token_logprobs, answer.choices[0].logprobs.top_logprobs, strict=True
    ):
        assert token == pytest.approx(max(top.values()))
        assert 0 < sum(math.exp(each) for each in top.values()) <= 1 + 1e-5


def test_beams_and_constraints(client: openai.OpenAI, service: Service) -> None:
    with grpc.insecure_channel(service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        beams = stub.GenerateOnce(request(n=2, max_tokens=8, beam_search=pb.BeamSearch(width=3)), timeout=60)
    assert beams.choices[0].score >= beams.choices[1].score
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model=service.model,
        messages=[{"role": "user", "content": "Which city is the capital of Italy?"}],
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")
