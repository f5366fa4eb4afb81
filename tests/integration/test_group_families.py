"""Two real engine-workers share a model whose layers differ in reach or have experts: what they compute is
what one computes, also when the pool is too small for all and when one of them is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.dispatch.sampling import SamplingRecord
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.integration.core_driver import CoreDriver
from tests.integration.plain_families import PLAIN_FAMILIES, write_plain
from tests.integration.test_worker_group import (
    LONG,
    SHARING,
    SHORT,
    Stream,
    Workers,
    outcome,
    served,
    until_all_have,
)
from tests.integration.tiny_families import write_tiny

PROMPTS = [LONG, SHARING, [(5 * i) % 61 + 1 for i in range(60)], *SHORT]
OUTPUT_TOKENS = 36
REQUESTS = [
    pb.GenerateRequest(
        token_ids=prompt,
        sampling=inference_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.0),
    )
    for prompt in PROMPTS
]
LONGEST = 128
# Models of several KV groups.
GROUPED = ("gpt-oss", "gemma3")
# gpt-oss has windows, experts, sinks and biases at once. The others are split in ways of their own.
CASES = (
    "gpt-oss",
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ("olmo2", "gemma3", "qwen2-moe", "qwen3-moe", "cohere-plus", "stablelm-12b")
    ),
    *(pytest.param(case, marks=pytest.mark.slow) for case in PLAIN_FAMILIES),
)
UNTIED = {"tie_word_embeddings": False}  # tied, so small a model repeats its input


def write(case: str, directory: Path) -> Path:
    """Writes a checkpoint, of a vocabulary that two ranks cannot share evenly."""
    if case not in PLAIN_FAMILIES:
        return write_tiny(case, directory, **UNTIED)
    directory.mkdir()
    write_plain(case, directory, 256)
    return directory


def generated_by_one(model: Path) -> list[list[int]]:
    """What a runner in this process computes, undisturbed."""
    driver = CoreDriver(model, num_blocks=256, max_model_len=LONGEST)
    assert (len(driver.facts.limits.kv_windows) > 1) == (model.name in GROUPED)
    served = driver.generate(PROMPTS, OUTPUT_TOKENS, SamplingRecord(temperature=0.0))
    return [request.token_ids[request.num_prompt_tokens :].tolist() for request, _ in served]


@pytest.mark.parametrize("case", CASES)
async def test_two_ranks_compute_the_tokens_of_one_though_requests_are_preempted_and_a_rank_is_killed(
    case: str, tmp_path: Path
) -> None:
    model = write(case, tmp_path / case)
    expected = await asyncio.to_thread(generated_by_one, model)
    assert any(len(set(tokens)) > 8 for tokens in expected), "too easy"
    # The longest request takes 8 blocks where layers see everything; there is no room for all.
    num_blocks = 24 if case in GROUPED else 12
    options = ("--num-blocks", str(num_blocks), "--max-model-len", str(LONGEST))
    workers = Workers(model, tmp_path / "two", 2, options)
    try:
        async with served(workers) as stub:
            streams = [Stream(stub, request) for request in REQUESTS]
            await until_all_have(streams[:1], 3)
            workers.processes[1].kill()
            before = [len(stream.tokens) for stream in streams]
            await asyncio.to_thread(workers.start_again, 1)
            assert await outcome(streams) == expected
            metrics = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
    finally:
        workers.close()
    assert max(before) < OUTPUT_TOKENS, "it came too late"
    [preemptions] = [
        line for line in metrics.splitlines() if line.startswith("pagewire:num_preemptions_total")
    ]
    assert float(preemptions.split()[1]) > 0
