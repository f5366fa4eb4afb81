"""Whose request it is, as the scheduler hears it, and what a refused caller hears."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import grpc
import pytest

from pagewire.base.errors import Code, InvalidRequest, Overloaded
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure, stop

KEYS = ("first-secret", "second-secret")


async def over_http(frontend: RunningFrontend, key: str, path: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(frontend.url, headers=headers) as session:
        async with session.post(path, json=body) as response:
            assert response.status == 200, await response.text()


async def over_grpc(frontend: RunningFrontend, key: str, user: str) -> None:
    async with AsyncClient(frontend.target, api_key=key, max_retries=0) as client:
        await client.generate("p", user=user)


async def test_a_client_is_its_key_over_any_protocol_and_endpoint(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply, scheduler.pool = b"x", lambda submit: [1.0, 2.0, 3.0, 4.0]
    frontend = await start_frontend(api_keys=KEYS)
    chat = [{"role": "user", "content": "hi"}]
    for key in KEYS:
        for user in ({}, {"user": "u"}):
            await over_http(frontend, key, "/v1/completions", {"prompt": "p", **user})
            await over_http(frontend, key, "/v1/chat/completions", {"messages": chat, **user})
            await over_http(frontend, key, "/v1/responses", {"input": "p", **user})
            await over_http(frontend, key, "/v1/embeddings", {"input": "p", "pooling": "mean", **user})
            await over_grpc(frontend, key, user.get("user", ""))
    clients = [submit.client for submit in scheduler.submits]
    groups = [set(clients[begin : begin + 5]) for begin in range(0, 20, 5)]
    assert all(len(group) == 1 for group in groups)
    (first, first_user, second, second_user) = (group.pop() for group in groups)
    assert len({first, first_user, second, second_user}) == 4
    assert first.split("/")[0] == first_user.split("/")[0] != second.split("/")[0]
    assert first_user.split("/")[1] == second_user.split("/")[1]
    assert first.endswith("/")


async def test_neither_keys_nor_users_are_sent_in_clear(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"x"
    frontend = await start_frontend(api_keys=KEYS)
    await over_http(frontend, KEYS[0], "/v1/completions", {"prompt": "p", "user": "someone@example.org"})
    sent = scheduler.submits[0].SerializeToString()
    assert b"secret" not in sent
    assert b"someone" not in sent


async def test_without_keys_users_are_told_apart_whatever_key_they_send(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"x"
    await over_http(frontend, "anything", "/v1/completions", {"prompt": "p", "user": "a"})
    await over_http(frontend, "else", "/v1/completions", {"prompt": "p", "user": "a"})
    await over_http(frontend, "else", "/v1/completions", {"prompt": "p", "user": "b"})
    first, same, other = (submit.client for submit in scheduler.submits)
    assert first == same != other
    assert first.startswith("/")


async def test_when_to_come_again_is_told_over_http(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with aiohttp.ClientSession(frontend.url) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p", "stream": True}))
        submit = await scheduler.submitted()
        ended = failure(Code.RESOURCE_EXHAUSTED, "it would take too long")
        ended.retry_after = 7.2
        await scheduler.say(submit.handle, [], end=ended)
        response = await asking
        assert response.status == 429
        assert response.headers["retry-after"] == "8"


async def test_when_to_come_again_is_told_over_grpc(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.create_task(client.generate("p"))
        submit = await scheduler.submitted()
        ended = failure(Code.RESOURCE_EXHAUSTED, "it would take too long")
        ended.retry_after = 7.2
        await scheduler.say(submit.handle, [], end=ended)
        with pytest.raises(Overloaded, match="too long") as caught:
            await asking
    assert caught.value.retry_after == 8


async def test_a_grpc_client_with_a_retry_policy_comes_again_when_it_is_told_to(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    policy = {
        "maxAttempts": 2,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    async with grpc.aio.insecure_channel(
        frontend.target, options=[("grpc.service_config", config)]
    ) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asking = asyncio.ensure_future(stub.GenerateOnce(pb.GenerateRequest(text="p")))
        refused = failure(Code.RESOURCE_EXHAUSTED, "too much")
        refused.retry_after = 0.2
        began = asyncio.get_running_loop().time()
        await scheduler.say((await scheduler.submitted()).handle, [], end=refused)
        again = await scheduler.submitted(2)
        assert asyncio.get_running_loop().time() - began > 0.9, "a second, as it is told in whole ones"
        await scheduler.say(again.handle, [97], end=stop(EOS))
        assert (await asking).text == "a"


async def test_the_field_at_fault_is_told_over_grpc(frontend: RunningFrontend) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("p" * 300)
    assert caught.value.param == "prompt"
