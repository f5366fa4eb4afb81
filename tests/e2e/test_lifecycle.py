"""Requests and processes come and go, and leave nothing behind."""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest

from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.client import complete_all
from tests.e2e.prompts import greedy
from tests.segments import segments_of
from tools.service import Service, processor_seconds

PROMPT = [(31 * index) % 4000 + 300 for index in range(100)]
SETTLE_SECONDS = 10.0


@pytest.fixture
async def stub(server: Service) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(server.grpc_target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def until_idle(service: Service) -> dict[str, float]:
    """The metrics, once nothing is running, waiting, in flight or holding blocks."""
    deadline = time.monotonic() + SETTLE_SECONDS
    names = ("num_requests_running", "num_requests_waiting", "num_steps_in_flight", "kv_cache_used_blocks")
    while True:
        metrics = await asyncio.to_thread(service.metrics)
        left = {name: metrics[f"pagewire:{name}"] for name in names}
        if not any(left.values()):
            return metrics
        assert time.monotonic() < deadline, f"left behind: {left}"
        await asyncio.sleep(0.02)


async def test_a_client_that_cancels_frees_its_blocks_within_a_step(
    server: Service, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    call = stub.Generate(greedy(PROMPT, 4000))
    assert (await call.read()).HasField("delta")
    before = server.metrics()
    assert before["pagewire:kv_cache_used_blocks"] > 0
    call.cancel()
    after = await until_idle(server)
    # Up to two steps were in flight and one may have been planned while the metrics were read.
    assert after["pagewire:steps_total"] - before["pagewire:steps_total"] <= 4


async def test_an_http_client_that_disconnects_frees_its_blocks_within_a_step(server: Service) -> None:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(timeout=30) as client:
        async with client.stream("POST", f"{server.http_url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            await anext(response.aiter_lines())
            before = server.metrics()
    after = await until_idle(server)
    assert after["pagewire:steps_total"] - before["pagewire:steps_total"] <= 4


async def test_a_deadline_ends_the_request_everywhere(
    server: Service, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GenerateOnce(greedy(PROMPT, 4000), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_idle(server)


@pytest.mark.parametrize("num_requests", [24, pytest.param(200, marks=pytest.mark.slow)])
async def test_requests_that_are_started_and_dropped_leave_nothing_behind(
    server: Service, stub: inference_pb2_grpc.InferenceServiceStub, num_requests: int
) -> None:
    rng = random.Random(5)
    await stub.GenerateOnce(greedy(PROMPT, 1))  # opens this client's connection
    await until_idle(server)
    descriptors = {role: process.num_fds() for role, process in server.processes().items()}

    async def start_and_drop() -> None:
        call = stub.Generate(greedy(rng.sample(PROMPT, rng.randrange(1, 100)), 400))
        for _ in range(rng.randrange(3)):
            await call.read()
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.05)
        call.cancel()

    for _ in range(num_requests // 8):
        await asyncio.gather(*(start_and_drop() for _ in range(8)))
    await until_idle(server)
    # None more; what a process used to start, it may have closed meanwhile. The connection over which the
    # metrics were read just now may still be open.
    deadline = time.monotonic() + SETTLE_SECONDS
    for role, process in server.processes().items():
        while process.num_fds() > descriptors[role]:
            assert time.monotonic() < deadline, f"{role}: {descriptors[role]} became {process.num_fds()}"
            await asyncio.sleep(0.05)
    assert segments_of(process.pid for process in server.processes().values()) == []
    (answer,) = await complete_all(server.grpc_target, [greedy(PROMPT, 4)], 1)
    assert len(answer.token_ids) == 4


async def test_an_idle_service_uses_no_cpu(server: Service) -> None:
    await until_idle(server)
    processes = server.processes()
    assert set(processes) == {"supervisor", "frontend", "scheduler", "engine-worker"}
    # Not at once: a scheduler that has just started reads the tokenizer once it is idle.
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        before = {role: processor_seconds(process) for role, process in processes.items()}
        await asyncio.sleep(2)
        used = {role: processor_seconds(process) - before[role] for role, process in processes.items()}
        # The kernel counts in hundredths of a second: one of them in two seconds is 0 %.
        if all(seconds <= 0.011 for seconds in used.values()):
            return
        assert time.monotonic() < deadline, used


async def test_a_long_prompt_does_not_stall_a_running_stream_beyond_its_chunks(tmp_path: Path) -> None:
    budget, long_prompt = 64, [(37 * index) % 4000 + 300 for index in range(800)]
    options = ("--engine", "null", "--null-step-ms", "10", "--max-num-batched-tokens", str(budget))
    with Service(tmp_path, options=options) as service:
        async with grpc.aio.insecure_channel(service.grpc_target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            stream = stub.Generate(greedy(PROMPT[:10], 2000))
            await anext(aiter(stream))
            gained = 0

            async def count() -> None:
                nonlocal gained
                async for event in stream:
                    gained += len(event.delta.token_ids)

            counter = asyncio.create_task(count())
            await stub.GenerateOnce(greedy(long_prompt, 1))
            chunks = math.ceil(len(long_prompt) / (budget - 1))
            assert gained >= chunks - 3, "every step that computes a chunk also gives the stream a token"
            stream.cancel()
            await asyncio.gather(counter, return_exceptions=True)


async def test_sigterm_lets_open_streams_finish_refuses_new_ones_and_exits_0(tmp_path: Path) -> None:
    runtime = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path: it holds Unix sockets
    options = ("--engine", "null", "--null-step-ms", "30")
    with Service(tmp_path, options=options, environment={"XDG_RUNTIME_DIR": str(runtime)}) as service:
        pids = [process.pid for process in service.processes().values()]
        async with grpc.aio.insecure_channel(service.grpc_target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            stream = stub.Generate(greedy(PROMPT, 60))
            await anext(aiter(stream))
            stopping = asyncio.create_task(asyncio.to_thread(service.stop))
            events = [event async for event in stream]
            assert events[-1].finished.usage.completion_tokens == 60
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GenerateOnce(greedy(PROMPT, 1), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await stopping == 0
        assert "Traceback" not in service.log
    runtime.rmdir()  # which succeeds only if it is empty
    assert segments_of(pids) == []
