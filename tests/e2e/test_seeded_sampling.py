"""A seed fixes the tokens: alone, in any batch, and after preemption."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import prompt_ids, seeded
from tools.service import Service


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> list[list[int]]:
    return prompt_ids(smollm2_dir)[:10]


@pytest.mark.slow  # tests/unit/engine/test_model_runner.py and test_worker_group.py say the same in seconds
async def test_same_tokens_alone_in_any_batch_and_after_preemption(
    server: Service, tmp_path: Path, prompts: list[list[int]]
) -> None:
    requests = [seeded(ids, seed, max_tokens=24) for seed, ids in enumerate(prompts, start=-3)]
    alone = tokens(await complete_all(server.grpc_target, requests, concurrency=1))
    together = tokens(await complete_all(server.grpc_target, requests, concurrency=10))
    backwards = tokens(await complete_all(server.grpc_target, requests[::-1], concurrency=5))
    assert together == alone
    assert backwards[::-1] == alone
    with Service(tmp_path, options=("--num-blocks", "24", "--max-model-len", "384")) as small:
        preempted = tokens(await complete_all(small.grpc_target, requests, concurrency=10))
        assert small.metrics()["pagewire:num_preemptions_total"] > 0
    assert preempted == alone


async def test_different_seeds_differ_and_no_seed_is_a_fresh_one(
    server: Service, prompts: list[list[int]]
) -> None:
    requests = [seeded(prompts[1], seed) for seed in range(4)]
    unseeded = [seeded(prompts[1], 0) for _ in range(3)]
    for request in unseeded:
        request.sampling.ClearField("seed")
    answers = tokens(await complete_all(server.grpc_target, requests + unseeded, concurrency=7))
    assert len({tuple(answer) for answer in answers}) == 7
