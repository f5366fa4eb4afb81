"""Processes die in the middle of streams, by kill -9 and by hanging; what a client sees of it is a pause."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy, seeded
from tests.e2e.test_lifecycle import until_idle
from tools.service import Service

NUM_STREAMS = 12
MAX_TOKENS = 200
SECONDS = 60.0


class Streams:
    """Open streams, each over a connection of its own, and what they have received."""

    def __init__(self, target: str, requests: Sequence[pb.GenerateRequest]) -> None:
        self.received: list[list[int]] = [[] for _ in requests]
        self._channels = [
            grpc.aio.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),))
            for _ in requests
        ]
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._calls = [stub.Generate(each) for stub, each in zip(stubs, requests, strict=True)]
        self._tasks = [asyncio.create_task(self._follow(index)) for index in range(len(requests))]

    async def _follow(self, index: int) -> pb.Finished:
        async for event in self._calls[index]:
            if event.HasField("delta"):
                self.received[index] += event.delta.token_ids
            elif event.HasField("finished"):
                return event.finished
        raise AssertionError("the stream ended without a word")

    async def until_each_has(self, count: int) -> None:
        """Returns when every stream that still runs has so many tokens."""
        async with asyncio.timeout(SECONDS):
            while any(
                len(each) < count and not task.done()
                for each, task in zip(self.received, self._tasks, strict=True)
            ):
                await asyncio.sleep(0.005)

    async def outcomes(self) -> list[pb.Finished | BaseException]:
        async with asyncio.timeout(SECONDS):
            return await asyncio.gather(*self._tasks, return_exceptions=True)

    def errors(self) -> list[BaseException]:
        """What ended the streams that an error has ended by now."""
        ended = (task.exception() for task in self._tasks if task.done())
        return [error for error in ended if error is not None]

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        for channel in self._channels:
            await channel.close()


@asynccontextmanager
async def streams(service: Service, requests: Sequence[pb.GenerateRequest]) -> AsyncIterator[Streams]:
    opened = Streams(service.grpc_target, requests)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """Two frontends before an engine without a model, in steps of some milliseconds."""
    options = ("--engine", "null", "--null-step-ms", "4", "--frontends", "2", "--step-timeout", "0.5")
    with Service(tmp_path_factory.mktemp("deaths"), options=options) as service:
        yield service


def requests_of(max_tokens: int) -> list[pb.GenerateRequest]:
    """Requests of which each gets a text that depends on its seed and on nothing else."""
    return [
        seeded(list(range(100, 110 + index)), seed=index, max_tokens=max_tokens)
        for index in range(NUM_STREAMS)
    ]


REQUESTS = requests_of(MAX_TOKENS)


@pytest.fixture(scope="module")
def expected(service: Service) -> list[list[int]]:
    """What they get when nothing happens."""
    return tokens(asyncio.run(complete_all(service.grpc_target, REQUESTS, NUM_STREAMS)))


def kill(role: str) -> Callable[[Service], None]:
    return lambda service: os.kill(service.processes()[role].pid, signal.SIGKILL)


def hang(service: Service) -> None:
    os.kill(service.processes()["engine-worker"].pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    "strike",
    [kill("engine-worker"), kill("scheduler"), hang],
    ids=["worker killed", "scheduler killed", "worker hangs"],
)
async def test_streams_go_on_as_if_nothing_had_happened(
    service: Service, expected: list[list[int]], strike: Callable[[Service], None]
) -> None:
    async with streams(service, REQUESTS) as opened:
        await opened.until_each_has(MAX_TOKENS // 8)
        before = [len(each) for each in opened.received]
        strike(service)
        outcomes = await opened.outcomes()
    assert max(before) < MAX_TOKENS, "it came too late"
    assert opened.received == expected
    assert all(isinstance(each, pb.Finished) for each in outcomes), outcomes
    await until_idle(service)
    if strike is hang:
        assert "hangs: step" in service.log
        assert "is killed" in service.log
    assert service.metrics()["pagewire:requests_quarantined_total"] == 0
    assert [name for name in os.listdir("/dev/shm") if name.startswith("pagewire")] == []


async def test_a_killed_frontend_takes_only_its_own_streams_with_it(
    service: Service, expected: list[list[int]]
) -> None:
    frontends = [
        child for child in psutil.Process(service.process.pid).children() if "frontend" in child.cmdline()[:5]
    ]
    assert len(frontends) == 2
    # Streams of many seconds: a busy client reads late, and what a frontend has sent outlives it.
    # So many that the kernel, which chooses a frontend for each connection, gives some to each.
    async with streams(service, requests_of(10 * MAX_TOKENS) * 2) as opened:
        await opened.until_each_has(MAX_TOKENS // 8)
        frontends[0].kill()
        await opened.until_each_has(5 * MAX_TOKENS)
        errors = opened.errors()
    assert 0 < len(errors) < 2 * NUM_STREAMS
    for error in errors:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    for received, wanted in zip(opened.received, expected * 2, strict=True):
        assert received[:MAX_TOKENS] == wanted[: len(received)]
    await until_idle(service)


async def test_streams_of_a_model_go_on_with_the_same_tokens(server: Service) -> None:
    """Greedy and seeded, over a worker that is killed, its successor's scheduler that is killed too."""
    prompts = [[(31 * index + 7 * salt) % 4000 + 300 for index in range(20)] for salt in range(4)]
    requests = [greedy(ids, 24) for ids in prompts[:2]]
    requests += [seeded(ids, seed=index, max_tokens=24) for index, ids in enumerate(prompts[2:])]
    expected = tokens(await complete_all(server.grpc_target, requests, len(requests)))
    async with streams(server, requests) as opened:
        for count, role in ((4, "engine-worker"), (12, "scheduler")):
            await opened.until_each_has(count)
            kill(role)(server)
        outcomes = await opened.outcomes()
    assert opened.received == expected
    assert all(isinstance(each, pb.Finished) for each in outcomes), outcomes
    await until_idle(server)
