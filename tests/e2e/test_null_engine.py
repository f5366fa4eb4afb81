"""`pagewire serve --engine null`: everything but a model."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess

import grpc
import httpx

from pagewire.base.own_packages import python_command, python_path
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.test_lifecycle import until_idle
from tools.service import Service


async def test_text_streams_over_both_protocols_and_is_the_same(null_service: Service) -> None:
    body = {"prompt": "Once", "max_tokens": 300, "seed": 4, "stream": True, "return_token_ids": True}
    token_ids, text = [], ""
    with httpx.stream("POST", f"{null_service.http_url}/v1/completions", json=body, timeout=30) as response:
        frames = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert frames.pop() == "[DONE]"
    for frame in map(json.loads, frames):
        token_ids += frame["choices"][0].get("token_ids", [])
        text += frame["choices"][0]["text"]
    assert frame["choices"][0]["finish_reason"] == "length"
    assert len(token_ids) == 300
    assert text.count(" ") > 200
    sampling = pb.SamplingParams(max_tokens=300, seed=4)
    async with grpc.aio.insecure_channel(null_service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streamed = [each async for each in stub.Generate(pb.GenerateRequest(text="Once", sampling=sampling))]
        whole = await stub.GenerateOnce(pb.GenerateRequest(text="Once", sampling=sampling))
    assert "".join(each.delta.text for each in streamed) == whole.text == text
    assert (
        [token for each in streamed for token in each.delta.token_ids] == list(whole.token_ids) == token_ids
    )
    assert streamed[-1].finished.usage.completion_tokens == 300


async def test_a_client_that_leaves_frees_its_blocks(null_service: Service) -> None:
    sampling = pb.SamplingParams(max_tokens=100_000)
    async with grpc.aio.insecure_channel(null_service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(text="Once", sampling=sampling))
        assert (await call.read()).HasField("delta")
        assert null_service.metrics()["pagewire:kv_cache_used_blocks"] > 0
        call.cancel()
        await until_idle(null_service)


def test_structured_output_ends_when_it_may(null_service: Service) -> None:
    body = {"prompt": "Pick", "max_tokens": 20, "structured_outputs": {"choice": ["left", "right"]}}
    answer = httpx.post(f"{null_service.http_url}/v1/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["text"] in ("left", "right")
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_every_call_of_a_burst_is_answered_or_refused_for_a_reason(null_service: Service) -> None:
    """More calls at once than the scheduler lets wait, and than gRPC's library lets by default."""
    request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(max_tokens=1))
    async with grpc.aio.insecure_channel(null_service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.GenerateOnce(request, timeout=60) for _ in range(2500)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    codes = {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
    assert codes <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert sum(isinstance(answer, pb.GenerateOnceResponse) for answer in answers) > 256


def test_what_runs_here_is_listed_and_watched(null_service: Service) -> None:
    listed = json.loads(pagewire("ps", "--json"))
    [mine] = [each for each in listed if each["pid"] == null_service.process.pid]
    assert (mine["http"], mine["grpc"], mine["state"]) == (
        null_service.http_url,
        null_service.grpc_target,
        "ready",
    )
    pids = {each["name"]: each["pid"] for each in mine["processes"]}
    running = {role: process.pid for role, process in null_service.processes().items()}
    assert {**pids, "supervisor": mine["pid"]} == running
    table = pagewire("top", "--once", "--interval", "0.2", "--url", null_service.http_url)
    assert null_service.model in table
    assert "0 running, 0 waiting" in table


def pagewire(*arguments: str) -> str:
    """What `pagewire ARGUMENTS` prints."""
    command = [*python_command("pagewire"), *arguments]
    environment = {**os.environ, **python_path()}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout
