"""A service whose model is shared by several workers: `pagewire serve -tp 3` of SmolLM2 over gloo. Its tokens
are those of one worker, also when a rank dies in the middle of streams."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pagewire import LLM, SamplingParams
from pagewire.base.errors import ConfigError, Unavailable
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.wire.sampling_params import BeamSearch, StructuredOutput
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy, seeded
from tests.e2e.test_deaths import streams
from tests.e2e.test_lifecycle import until_idle
from tools.chaos.processes import living
from tools.service import NO_CERTIFICATES, Service

NUM_RANKS = 3
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", str(1 << 28))
PROMPTS = [[(31 * index + 7 * salt) % 4000 + 300 for index in range(20)] for salt in range(4)]
REQUESTS = [greedy(ids, 24) for ids in PROMPTS[:3]] + [seeded(PROMPTS[3], seed=5, max_tokens=24)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = (*OPTIONS, "-tp", str(NUM_RANKS))
    with Service(tmp_path_factory.mktemp("ranks"), options=options) as service:
        yield service


@pytest.fixture(scope="module")
def expected(float32_server: Service) -> list[list[int]]:
    """What one worker computes."""
    return tokens(asyncio.run(complete_all(float32_server.grpc_target, REQUESTS, len(REQUESTS))))


def named(ranks: Service, rank: int) -> int:
    """The id of a rank's process."""
    return living(ranks)[f"engine-worker-{rank}"].pid


async def test_ranks_give_one_workers_tokens_and_each_is_seen(
    ranks: Service, expected: list[list[int]]
) -> None:
    assert tokens(await complete_all(ranks.grpc_target, REQUESTS, len(REQUESTS))) == expected
    names = [name for name in living(ranks) if name.startswith("engine-worker")]
    assert names == [f"engine-worker-{rank}" for rank in range(NUM_RANKS)]
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as client:
        info = (await client.get(f"{ranks.http_url}/server_info")).json()
    assert "cpu, cpu, cpu (tp 3)" in str(info)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_streams_go_on_with_one_workers_tokens_when_a_rank_is_killed(
    ranks: Service, expected: list[list[int]], rank: int
) -> None:
    others = [named(ranks, other) for other in range(NUM_RANKS) if other != rank]
    async with streams(ranks, REQUESTS) as opened:
        await opened.until_each_has(4)
        before = [len(each) for each in opened.received]
        os.kill(named(ranks, rank), signal.SIGKILL)
        outcomes = await opened.outcomes()
    assert max(before) < 24, "it came too late"
    assert opened.received == expected
    assert all(isinstance(each, pb.Finished) for each in outcomes), outcomes
    await until_idle(ranks)
    assert re.search(rf"the engine-worker of rank {rank} \(pid \d+, cpu\) died", ranks.log)
    assert [named(ranks, other) for other in range(NUM_RANKS) if other != rank] == others


@pytest.mark.slow
def test_a_program_has_ranks_of_its_own_and_is_told_when_one_dies() -> None:
    with LLM(device="cpu", tensor_parallel_size=NUM_RANKS, kv_cache_memory=1 << 28) as llm:
        [output] = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=2))
        assert output.outputs[0].text.startswith(" Paris")
        processes = llm._running()._workers.processes
        processes[2].kill()
        processes[2].wait()
        with pytest.raises(Unavailable, match="the engine-worker of rank 2 ended with status -9"):
            llm.generate(["again"])
        assert all(process.poll() is not None for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"tensor_parallel_size": 2}, "tp 2"),  # six heads and three, and channels in unequal parts
        ({"pipeline_parallel_size": 2}, "pp 2"),
        ({"tensor_parallel_size": 3, "pipeline_parallel_size": 2}, "tp 3, pp 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_that_requests_may_ask_for_is_the_same_with_ranks(
    options: dict[str, Any], sizes: str, alone: list[Any]
) -> None:
    with LLM(device="cpu", dtype="float32", kv_cache_memory=1 << 28, **options) as llm:
        assert llm._running().facts.device.endswith(f"({sizes})")
        assert asked(llm) == alone


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """What one worker answers."""
    with LLM(device="cpu", dtype="float32", kv_cache_memory=1 << 28) as llm:
        return asked(llm)


def asked(llm: LLM) -> list[Any]:
    """Samples, log probabilities of answer and prompt, a constraint, beams, and a hit in the prefix cache."""
    prompt = "The capital of France is"
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Lyon"]}}, "required": ["city"]}
    params = [
        SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=12, repetition_penalty=1.1),
        SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=1),
        SamplingParams(
            temperature=0, max_tokens=24, structured_output=StructuredOutput(json_schema=json.dumps(schema))
        ),
        SamplingParams(temperature=0, max_tokens=6, n=2, beam_search=BeamSearch(width=3)),
    ]
    found: list[Any] = []
    batches = [llm.generate([prompt] * len(params), params), llm.generate([prompt * 8] * 2, params[0])]
    for outputs in batches:
        for output in outputs:
            found += [completion.token_ids for completion in output.outputs]
            found += [
                round(entry.logprob, 3)
                for entries in (output.prompt_logprobs or [], output.outputs[0].logprobs or [])
                for entry in entries
                if entry is not None
            ]
    return found


@pytest.mark.slow
def test_ranks_that_cannot_share_a_model_say_so() -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads is 3, fewer than ranks, and does not divide"):
        LLM(device="cpu", tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="the model has 30 layers, too few for 31 pipeline stages"):
        LLM(device="cpu", pipeline_parallel_size=31)
