"""Engine-workers as stages of a pipeline, over gloo, under a real scheduler: they compute what one computes,
and go on when one of them dies or hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.dispatch.control import rank_socket
from engine.models.stages import cut
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.integration.test_group_families import GROUPED, LONGEST, generated_by_one, write
from tests.integration.test_group_families import REQUESTS as FAMILY_REQUESTS
from tests.integration.test_worker_group import (
    REQUESTS,
    STEP_TIMEOUT,
    Stream,
    Workers,
    outcome,
    served,
    until_all_have,
)
from tests.unit.engine.tiny_model import write_model

SIZES = [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pipeline") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one worker computes."""
    workers = Workers(model, tmp_path_factory.mktemp("one") / "one", 1)

    async def run() -> list[list[int]]:
        async with served(workers) as stub:
            return await outcome([Stream(stub, request) for request in REQUESTS])

    try:
        return asyncio.run(run())
    finally:
        workers.close()


@pytest.fixture(scope="module", params=SIZES, ids=lambda sizes: f"tp{sizes[0]}pp{sizes[1]}")
def stages(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Workers]:
    tp, pp = request.param
    workers = Workers(model, tmp_path_factory.mktemp("stages") / "stages", tp, pp=pp)
    yield workers
    workers.close()


async def test_stages_compute_the_tokens_of_one_worker(stages: Workers, expected: list[list[int]]) -> None:
    """Greedy and seeded, in chunks, and again with the prefixes found in the cache; and each alone, of which
    there is only one step at a time."""
    async with served(stages) as stub:
        for _ in range(2):
            assert await outcome([Stream(stub, request) for request in REQUESTS]) == expected
        assert await outcome([Stream(stub, REQUESTS[2])]) == expected[2:3]


async def test_requests_that_end_with_their_first_token_leave_nothing_behind(
    stages: Workers, expected: list[list[int]]
) -> None:
    """Nobody waits for their tokens on the first stage."""
    async with served(stages) as stub:
        short = pb.GenerateRequest.FromString(REQUESTS[3].SerializeToString())
        short.sampling.max_tokens = 1
        for _ in range(20):
            assert await outcome([Stream(stub, short)]) == [expected[3][:1]]
        assert await outcome([Stream(stub, REQUESTS[3])]) == expected[3:4]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_streams_go_on_when_a_stage_is_killed(
    stages: Workers, expected: list[list[int]], rank: int
) -> None:
    survivors = [process for other, process in enumerate(stages.processes) if other != rank]
    async with served(stages) as stub:
        streams = [Stream(stub, request) for request in REQUESTS]
        await until_all_have(streams, 5)
        stages.processes[rank].kill()
        before = [len(stream.tokens) for stream in streams]
        await asyncio.to_thread(stages.start_again, rank)
        assert await outcome(streams) == expected
    assert max(before) < 60, "it came too late"
    assert all(process.poll() is None for process in survivors)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_the_stage_that_hangs_is_found_and_killed_and_the_others_are_not(
    stages: Workers, expected: list[list[int]], rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    for other in range(len(stages.processes)):
        path = rank_socket(stages.socket, other)
        path.with_name(f"{path.name}.warm").touch()
    survivors = [process for other, process in enumerate(stages.processes) if other != rank]
    async with served(stages, STEP_TIMEOUT) as stub:
        streams = [Stream(stub, request) for request in REQUESTS]
        await until_all_have(streams, 5)
        os.kill(stages.processes[rank].pid, signal.SIGSTOP)
        await asyncio.to_thread(stages.start_again, rank)
        assert await outcome(streams) == expected
    assert f"the worker of rank {rank}" in caplog.text or "is killed" in caplog.text
    assert all(process.poll() is None for process in survivors)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt-oss", "gemma3", "qwen3-moe", "cohere-plus", "olmo2"])
async def test_stages_of_any_family_though_requests_are_preempted(case: str, tmp_path: Path) -> None:
    model = write(case, tmp_path / case)
    expected = await asyncio.to_thread(generated_by_one, model)
    num_blocks = 24 if case in GROUPED else 12
    options = ("--num-blocks", str(num_blocks), "--max-model-len", str(LONGEST))
    workers = Workers(model, tmp_path / "two", 1, options, pp=2)
    try:
        async with served(workers) as stub:
            assert await outcome([Stream(stub, request) for request in FAMILY_REQUESTS]) == expected
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("costs", "last", "count", "ends"),
    [
        ([1] * 8, 0, 2, [4, 8]),
        ([1] * 8, 2, 2, [5, 8]),  # the output projection is worth two layers
        ([4, 1, 1, 1, 1], 0, 2, [1, 5]),
        ([1, 1], 100, 2, [1, 2]),
        ([1] * 5, 0, 3, [1, 3, 5]),
    ],
)
def test_layers_are_cut_where_the_slowest_stage_has_least_to_do(
    costs: list[int], last: int, count: int, ends: list[int]
) -> None:
    found = cut(costs, last, count)
    assert len(found) == count
    assert found[-1] == len(costs)

    def slowest(cuts: list[int]) -> int:
        begins = [0, *cuts[:-1]]
        stages = [sum(costs[begin:end]) for begin, end in zip(begins, cuts, strict=True)]
        return max(*stages[:-1], stages[-1] + last)

    assert slowest(found) == slowest(ends)
