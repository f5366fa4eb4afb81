"""Several replicas of a model behind one service: what they compute, where requests go, and who may die."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from pagewire.base.own_packages import python_command, python_path
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.client import complete_all, tokens
from tools.chaos.processes import living
from tools.chaos.run import chaos, faults, start
from tools.chaos.strikes import REPLICA, Strikes
from tools.service import Service

NULL = ("--engine", "null", "--null-step-ms", "10", "--frontends", "2", "-dp", "2")
BLOCK = 16


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("replicas"), options=NULL) as service:
        until_healthy(service)
        yield service


def until_healthy(service: Service, count: int = 2) -> None:
    """Waits until a frontend sends requests to `count` replicas. The other frontend sees what it sees."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if all(httpx.get(f"{service.http_url}/health").json()["healthy"] == count for _ in range(8)):
            return
        time.sleep(0.05)
    raise AssertionError(service.log)


def completed(service: Service, prompt: list[int], **fields: object) -> dict[str, object]:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1, "return_token_ids": True, **fields}
    response = httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(seed: int, num_blocks: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 4000) for _ in range(num_blocks * BLOCK + 1)]


def per_replica(service: Service, name: str) -> dict[str, float]:
    """A metric's value at each replica."""
    found = {}
    for key, value in service.metrics().items():
        if key.startswith(f'pagewire:{name}{{replica="'):
            found[key.partition('replica="')[2].partition('"')[0]] = value
    return found


def test_conversations_stay_where_their_prefix_is(service: Service) -> None:
    prompts = [prompt_of(seed, 6) for seed in range(6)]
    for prompt in prompts:
        completed(service, prompt)
    time.sleep(0.3)  # both frontends are told of the blocks
    for turn in range(3):
        for prompt in prompts:
            usage = completed(service, [*prompt, 500 + turn])["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= 6 * BLOCK  # type: ignore[index]
    assert all(value > 0 for value in per_replica(service, "prefix_cache_queries_total").values())


def test_tokens_do_not_depend_on_the_replica(service: Service) -> None:
    answers = [completed(service, prompt_of(50, 2), cache_salt=str(n), max_tokens=16) for n in range(6)]
    assert len({str(each["choices"][0]["token_ids"]) for each in answers}) == 1  # type: ignore[index]


def test_a_salt_is_part_of_the_prefix(service: Service) -> None:
    prompt = prompt_of(60, 4)
    completed(service, prompt, cache_salt="a")
    time.sleep(0.2)
    usage = completed(service, prompt, cache_salt="b")["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0  # type: ignore[index]


def test_health_and_metrics_tell_replicas_apart(service: Service) -> None:
    health = httpx.get(f"{service.http_url}/health").json()
    assert (health["status"], health["healthy"], health["total"]) == ("ok", 2, 2)
    assert [each["name"] for each in health["servers"]] == ["0", "1"]
    assert set(per_replica(service, "num_requests_running")) == {"0", "1"}
    text = httpx.get(f"{service.http_url}/metrics").text
    assert 'vllm:num_requests_running{model_name="smollm2-135m",engine="1"}' in text
    load = httpx.get(f"{service.http_url}/load").json()
    assert (
        load["max_num_seqs"]
        == 2 * httpx.get(f"{service.http_url}/server_info").json()["engine"]["max_num_seqs"]
    )


def command(service: Service, *words: str) -> str:
    return subprocess.run(
        [*python_command("pagewire"), *words],
        env={**os.environ, **python_path()},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_a_drained_replica_gets_nothing_until_it_is_resumed(service: Service) -> None:
    pid = str(service.process.pid)
    said = command(service, "drain", "--pid", pid, "--replica", "0", "--timeout", "5")
    assert "replica 0 is drained" in said
    before = per_replica(service, "prefix_cache_queries_total")
    for seed in range(4):
        completed(service, prompt_of(100 + seed, 2))
    after = per_replica(service, "prefix_cache_queries_total")
    assert after["0"] == before["0"]
    assert after["1"] > before["1"]
    assert httpx.get(f"{service.http_url}/health").json()["status"] == "degraded"
    command(service, "drain", "--pid", pid, "--replica", "0", "--resume")
    until_healthy(service)


def requests(count: int, max_tokens: int) -> list[pb.GenerateRequest]:
    return [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt_of(200 + number, 2)),
            sampling=pb.SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("roles", [("scheduler",), ("engine-worker",), ("scheduler", "engine-worker")])
async def test_streams_lose_nothing_when_a_replica_or_a_part_of_it_is_killed(
    service: Service, roles: tuple[str, ...]
) -> None:
    asked = requests(12, 80)
    expected = tokens(await complete_all(service.grpc_target, asked, len(asked)))
    received: list[list[int]] = [[] for _ in asked]

    async def follow(stub: inference_pb2_grpc.InferenceServiceStub, number: int) -> None:
        async for event in stub.Generate(asked[number], timeout=60):
            received[number] += event.delta.token_ids

    async with grpc.aio.insecure_channel(service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        following = [asyncio.create_task(follow(stub, number)) for number in range(len(asked))]
        while min(map(len, received)) < 10:
            await asyncio.sleep(0.01)
        assert max(map(len, received)) < 80, "it came too late"
        running = living(service)
        for role in roles:
            running[f"{role}-1"].send_signal(signal.SIGKILL)
        await asyncio.gather(*following)
    assert received == expected
    await asyncio.to_thread(until_healthy, service)


def test_ps_lists_the_processes_of_replicas(service: Service) -> None:
    said = command(service, "ps")
    for name in ("scheduler-0", "scheduler-1", "engine-worker-0", "engine-worker-1", "frontend-1"):
        assert name in said


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_whole_replicas_and_all_parts_are_killed(tmp_path: Path, smollm2_dir: Path) -> None:
    async def disturb(strikes: Strikes) -> None:
        for kinds in ((REPLICA,), ("scheduler", "engine-worker"), (REPLICA, "frontend"), ("scheduler",)):
            await strikes.strike_each(kinds)
            await asyncio.sleep(2.0)

    service = start(tmp_path, "null", 16, step_timeout=2.0, replicas=2)
    try:
        results = await chaos(service, disturb, num_streams=16, seed=6, greedy=False)
    finally:
        status = service.stop()
    assert faults(results) == {}
    assert status == 0
    assert results["strikes"][REPLICA] == 4
