"""Python gRPC clients, by the stubs and by pagewire's own, against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pagewire import Client, SamplingParams
from pagewire.base.errors import DeadlineExceeded, InvalidRequest, NotFound
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

GREEDY = SamplingParams(temperature=0, max_tokens=16)
MESSAGES = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture
def channel(server: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc_target) as client:
        yield client


def test_stub_streams_deltas_and_one_finished(channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    sampling = pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    *deltas, last = stub.Generate(pb.GenerateRequest(text="Once upon", request_id="it", sampling=sampling))
    assert {event.request_id for event in [*deltas, last]} == {"it"}
    assert all(event.WhichOneof("event") == "delta" for event in deltas)
    assert last.finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.finished.usage.completion_tokens == 8
    assert sum(len(event.delta.token_ids) for event in deltas) == 8
    counts = [event.delta.usage.completion_tokens for event in deltas]
    assert counts == sorted(counts)


def test_client_answers_a_conversation(client: Client) -> None:
    whole = client.generate(messages=MESSAGES, sampling_params=GREEDY)
    assert "Paris" in whole.text
    deltas = list(client.generate(messages=MESSAGES, sampling_params=GREEDY, stream=True))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)


def test_text_and_its_token_ids_give_the_same(client: Client) -> None:
    text = "The quick brown fox"
    by_ids = client.generate(token_ids=client.tokenize(text), sampling_params=GREEDY)
    assert list(client.generate(text, GREEDY).token_ids) == list(by_ids.token_ids)


def test_models_load_and_detokenize(server: Any, client: Client, channel: grpc.Channel) -> None:
    (model,) = client.models()
    assert (model.id, model.vocab_size) == (server.model, 49152)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    ids = client.tokenize("naïve ☃")
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == "naïve ☃"
    load = stub.GetLoad(pb.GetLoadRequest())
    assert load.max_num_seqs > 0
    assert 0 <= load.kv_cache_usage <= 1


def test_errors_are_typed(client: Client) -> None:
    with pytest.raises(NotFound):
        client.generate("x", model="other")
    with pytest.raises(InvalidRequest, match="token id 49152"):
        client.generate(token_ids=[49152])
    with pytest.raises(DeadlineExceeded):
        client.generate("x", SamplingParams(ignore_eos=True, max_tokens=2000), timeout=0.3)


def test_health_and_reflection(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "pagewire.inference.v1.InferenceService"):
        status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    described = ProtoReflectionDescriptorDatabase(channel)
    assert "pagewire.inference.v1.InferenceService" in described.get_services()
    found = described.FindFileContainingSymbol("pagewire.inference.v1.GenerateRequest")
    assert found.name == "pagewire/inference/v1/inference.proto"


def test_closed_stream_frees_its_place(client: Client, channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stream = client.generate("Once", SamplingParams(ignore_eos=True, max_tokens=2000), stream=True)
    next(stream)
    assert stub.GetLoad(pb.GetLoadRequest()).num_requests_running == 1
    stream.close()
    deadline = time.monotonic() + 5
    while stub.GetLoad(pb.GetLoadRequest()).num_requests_running:
        assert time.monotonic() < deadline, "the request is still running 5 s later"
        time.sleep(0.02)
