"""Two real engine-workers share a model over gloo, under a real scheduler: what they compute, and what
becomes of it when one of them dies or hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import grpc
import pytest

from engine.dispatch.control import rank_socket
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.serve.server import SchedulerServer
from tests.unit.engine.tiny_model import write_model
from tests.unit.scheduler.test_service import is_ready

START_SECONDS = 60.0
STEP_TIMEOUT = 2.0
# A prompt of several chunks, one that shares whole blocks with it, and short ones.
OPTIONS = ("--device", "cpu", "--num-blocks", "128", "--max-num-seqs", "8", "--max-num-batched-tokens", "32")
LONG = [(7 * i) % 61 + 1 for i in range(90)]
SHARING = [*LONG[:64], 5, 6, 7]
SHORT = [[3, 1, 4, 1, 5], [9, 2, 6]]
REQUESTS = [
    pb.GenerateRequest(
        token_ids=prompt,
        sampling=inference_pb2.SamplingParams(
            max_tokens=60, ignore_eos=True, temperature=temperature, seed=index, top_p=0.9
        ),
    )
    for index, (prompt, temperature) in enumerate(
        [(LONG, 0.0), (SHARING, 0.0), (LONG, 3.0), (SHORT[0], 0.0), (SHORT[1], 3.0), (SHARING, 3.0)]
    )
]


class Workers:
    """The ranks of one group, as processes. Of `options` and OPTIONS the former count."""

    def __init__(
        self, model: Path, directory: Path, tp: int, options: Sequence[str] = (), *, pp: int = 1
    ) -> None:
        directory.mkdir()
        self._options = (*OPTIONS, *options)
        self.socket = directory / "worker.sock"
        self._model, self._sizes = model, (tp, pp)
        self._logs: list[IO[bytes]] = []
        self.processes = [self._start(rank) for rank in range(tp * pp)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "engine", str(self._model), "--socket", str(self.socket)]
        tp, pp = map(str, self._sizes)
        command += ["--rank", str(rank), "--tensor-parallel-size", tp, "--pipeline-parallel-size", pp]
        command += self._options
        self._logs.append((self.socket.parent / f"{len(self._logs)}.log").open("w+b"))
        return subprocess.Popen(
            command, stderr=self._logs[-1], env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )

    def start_again(self, rank: int) -> None:
        """A successor of one that has ended, as its supervisor would."""
        self.processes[rank].wait(START_SECONDS)
        self.processes[rank] = self._start(rank)

    @property
    def log(self) -> str:
        """What all of them have said."""
        return "".join(Path(file.name).read_text() for file in self._logs)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for file in self._logs:
            file.close()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workers, Workers]]:
    """One worker alone, and two that share the same model."""
    directory = tmp_path_factory.mktemp("group")
    model = write_model(directory / "model", tie_word_embeddings=False)
    both = Workers(model, directory / "one", 1), Workers(model, directory / "two", 2)
    yield both
    for workers in both:
        workers.close()


@asynccontextmanager
async def served(
    workers: Workers, step_timeout: float = 60.0
) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceStub]:
    """A scheduler over the workers."""
    address = f"unix:{workers.socket.parent}/scheduler.sock"
    config = SchedulerConfig(listen=(address,), worker_socket=workers.socket, step_timeout=step_timeout)
    server = SchedulerServer(config)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        async with asyncio.timeout(START_SECONDS):
            while not await is_ready(stub):
                await asyncio.sleep(0.02)
        yield stub
    await server.stop()


class Stream:
    """A request's tokens as they come."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub, request: pb.GenerateRequest) -> None:
        self.tokens: list[int] = []
        self.num_cached_tokens = 0
        self.task = asyncio.create_task(self._follow(stub.Generate(request)))

    async def _follow(self, call: AsyncIterator[pb.GenerateResponse]) -> None:
        async for event in call:
            if event.HasField("token"):
                self.tokens.append(event.token.token_id)
            elif event.HasField("ended"):
                assert event.ended.reason == pb.END_REASON_LENGTH, event.ended


async def until_all_have(streams: list[Stream], count: int) -> None:
    async with asyncio.timeout(START_SECONDS):
        while any(len(stream.tokens) < count for stream in streams):
            await asyncio.sleep(0.002)


async def outcome(streams: list[Stream]) -> list[list[int]]:
    async with asyncio.timeout(START_SECONDS):
        await asyncio.gather(*(stream.task for stream in streams))
    return [stream.tokens for stream in streams]


@pytest.fixture(scope="module")
def expected(groups: tuple[Workers, Workers]) -> list[list[int]]:
    """What one worker computes."""

    async def run() -> list[list[int]]:
        async with served(groups[0]) as stub:
            return await outcome([Stream(stub, request) for request in REQUESTS])

    return asyncio.run(run())


async def test_two_ranks_compute_the_tokens_of_one(
    groups: tuple[Workers, Workers], expected: list[list[int]]
) -> None:
    """Greedy and seeded, in chunks, and again with the prefixes found in the cache."""
    async with served(groups[1]) as stub:
        for _ in range(2):
            assert await outcome([Stream(stub, request) for request in REQUESTS]) == expected
        metrics = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
    hits = next(line for line in metrics.splitlines() if line.startswith("pagewire:prefix_cache_hits_total"))
    assert float(hits.split()[1]) > len(LONG)
    assert sum(len(set(tokens)) > 8 for tokens in expected) >= 5, "too easy"


async def test_streams_go_on_when_a_rank_is_killed_and_the_other_keeps_its_weights(
    groups: tuple[Workers, Workers], expected: list[list[int]]
) -> None:
    workers = groups[1]
    survivor = workers.processes[0]
    async with served(workers) as stub:
        streams = [Stream(stub, request) for request in REQUESTS]
        await until_all_have(streams, 5)
        workers.processes[1].kill()
        before = [len(stream.tokens) for stream in streams]
        await asyncio.to_thread(workers.start_again, 1)
        assert await outcome(streams) == expected
    assert max(before) < 60, "it came too late"
    assert survivor.poll() is None


async def test_the_rank_that_hangs_is_found_and_killed_and_the_other_is_not(
    groups: tuple[Workers, Workers], expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Both are late, because one waits for the other."""
    workers = groups[1]
    for rank in range(2):  # past the first steps, which may take longer
        rank_socket(workers.socket, rank).with_name(rank_socket(workers.socket, rank).name + ".warm").touch()
    async with served(workers, STEP_TIMEOUT) as stub:
        streams = [Stream(stub, request) for request in REQUESTS]
        await until_all_have(streams, 5)
        os.kill(workers.processes[0].pid, signal.SIGSTOP)
        await asyncio.to_thread(workers.start_again, 0)
        assert await outcome(streams) == expected
    assert "hangs: it has answered no scheduler" in caplog.text
    assert workers.processes[1].poll() is None
    assert list(workers.socket.parent.glob("*.group-*")) == []
