"""Services with draft tokens: the tokens of one without, whoever dies, and with ranks sharing the model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from tests.e2e.client import complete_all, tokens
from tests.e2e.prompts import greedy, seeded
from tests.e2e.test_deaths import streams
from tests.e2e.test_lifecycle import until_idle
from tools.chaos.processes import living
from tools.service import NO_CERTIFICATES, Service

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", str(1 << 28))
DRAFTS = ("--num-speculative-tokens", "4")
# What repeats itself is proposed.
PROMPTS = [[(7 * index + salt) % 11 + 300 for index in range(60)] for salt in range(3)]
REQUESTS = [greedy(ids, 32) for ids in PROMPTS] + [seeded(PROMPTS[0], seed=5, max_tokens=32)]


@pytest.fixture(scope="module")
def expected(float32_server: Service) -> list[list[int]]:
    """What a service without drafts computes."""
    return tokens(asyncio.run(complete_all(float32_server.grpc_target, REQUESTS, len(REQUESTS))))


@pytest.fixture(scope="module", params=[(), ("-tp", "3")], ids=["one worker", "three ranks"])
def service(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("drafts"), options=(*OPTIONS, *DRAFTS, *request.param)) as served:
        yield served


async def accepted(service: Service) -> float:
    """Draft tokens that were accepted so far."""
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as client:
        text = (await client.get(f"{service.http_url}/metrics")).text
    lines = [
        line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.slow
async def test_tokens_are_those_without_drafts(service: Service, expected: list[list[int]]) -> None:
    assert tokens(await complete_all(service.grpc_target, REQUESTS, len(REQUESTS))) == expected
    assert await accepted(service) > 0


@pytest.mark.slow
@pytest.mark.parametrize("role", ["engine-worker", "scheduler"])
async def test_streams_go_on_with_the_same_tokens(
    service: Service, expected: list[list[int]], role: str
) -> None:
    if role == "engine-worker" and "-tp" in service.options:
        role = "engine-worker-1"
    async with streams(service, REQUESTS) as opened:
        await opened.until_each_has(6)
        os.kill(living(service)[role].pid, signal.SIGKILL)
        outcomes: list[Any] = await opened.outcomes()
    assert opened.received == expected
    assert all(isinstance(each, pb.Finished) for each in outcomes), outcomes
    await until_idle(service)


@pytest.mark.slow
async def test_a_form_is_kept_where_others_have_drafts(service: Service) -> None:
    async with httpx.AsyncClient(verify=NO_CERTIFICATES, timeout=60) as client:
        answer = await client.post(
            f"{service.http_url}/v1/chat/completions",
            json={
                "model": service.model,
                "messages": [{"role": "user", "content": "Name a color."}],
                "max_tokens": 20,
                "structured_outputs": {"choice": ["red", "green"]},
            },
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] in ("red", "green")
