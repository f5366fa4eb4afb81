"""Ranks on GPUs, under a real scheduler. Two ranks that share one GPU add up over its memory, as ranks with a
GPU each do with small tensors; with two GPUs NCCL adds up the large ones, and stages of a pipeline meet."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.dispatch.control import rank_socket
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.integration.test_cuda_worker import model as model  # a fixture
from tests.integration.test_worker_group import Stream, Workers, outcome, served, until_all_have

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")

# The same bits in any batch, so that a stream that is computed again goes on with the same tokens.
OPTIONS = (
    "--deterministic",
    "--max-model-len",
    "256",
    "--num-blocks",
    "256",
    "--max-num-batched-tokens",
    "64",
)
ONE_GPU, EACH = ("--device", "cuda:0"), ("--device", "cuda")
PROMPTS = [
    [(7 * index + 13 * salt) % 2000 for index in range(length)] for salt, length in enumerate((1, 30, 150))
]
MAX_TOKENS = 60
STEP_TIMEOUT = 5.0


def request(prompt: list[int], seed: int) -> pb.GenerateRequest:
    sampling = inference_pb2.SamplingParams(
        max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.8 * (seed % 2), seed=seed
    )
    return pb.GenerateRequest(token_ids=prompt, sampling=sampling)


REQUESTS = [request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 2)]
CASES = [
    pytest.param((2, 1, ONE_GPU), id="tp 2 on one GPU"),
    pytest.param((2, 1, EACH), id="tp 2", marks=two_gpus),
    pytest.param((1, 2, EACH), id="pp 2", marks=two_gpus),
]


@pytest.fixture(scope="module", params=CASES)
def case(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Workers]:
    tp, pp, device = request.param
    workers = Workers(model, tmp_path_factory.mktemp("ranks") / "ranks", tp, (*OPTIONS, *device), pp=pp)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def undisturbed(case: Workers) -> list[list[int]]:
    """What the ranks compute."""

    async def run() -> list[list[int]]:
        async with served(case) as stub:
            return await outcome([Stream(stub, each) for each in REQUESTS])

    return asyncio.run(run())


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[int]]]:
    """What one worker computes on one GPU."""
    workers = Workers(model, tmp_path_factory.mktemp("one") / "one", 1, (*OPTIONS, *ONE_GPU))

    async def run() -> list[list[int]]:
        async with served(workers) as stub:
            return await outcome([Stream(stub, each) for each in REQUESTS])

    try:
        yield asyncio.run(run())
    finally:
        workers.close()


async def test_ranks_give_the_tokens_of_one_gpu_up_to_ties(
    undisturbed: list[list[int]], one: list[list[int]]
) -> None:
    """Sums in another order differ in their last bits, and so may tokens whose logits are nearly equal."""
    same = sum(
        next((index for index, pair in enumerate(zip(*both, strict=True)) if pair[0] != pair[1]), MAX_TOKENS)
        for both in zip(undisturbed, one, strict=True)
    )
    assert same > 0.5 * MAX_TOKENS * len(one)


async def test_they_give_the_same_again_with_prefixes_in_the_cache(
    case: Workers, undisturbed: list[list[int]]
) -> None:
    async with served(case) as stub:
        for _ in range(2):
            assert await outcome([Stream(stub, each) for each in REQUESTS]) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
async def test_streams_go_on_when_a_rank_is_killed_and_the_other_keeps_its_weights(
    case: Workers, undisturbed: list[list[int]], rank: int
) -> None:
    survivor = case.processes[1 - rank]
    async with served(case) as stub:
        streams = [Stream(stub, each) for each in REQUESTS]
        await until_all_have(streams, 5)
        case.processes[rank].kill()
        await asyncio.to_thread(case.start_again, rank)
        assert await outcome(streams) == undisturbed
    assert survivor.poll() is None, case.log


async def test_the_rank_that_hangs_is_killed_and_the_other_is_not(
    case: Workers, undisturbed: list[list[int]]
) -> None:
    """Whose kernel waits for the other's numbers until it is told to stop."""
    for rank in range(2):
        path = rank_socket(case.socket, rank)
        path.with_name(f"{path.name}.warm").touch()
    survivor = case.processes[1]
    async with served(case, STEP_TIMEOUT) as stub:
        streams = [Stream(stub, each) for each in REQUESTS]
        await until_all_have(streams, 5)
        os.kill(case.processes[0].pid, signal.SIGSTOP)
        await asyncio.to_thread(case.start_again, 0)
        assert await outcome(streams) == undisturbed
    assert survivor.poll() is None, case.log
