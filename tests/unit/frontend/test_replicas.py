"""A frontend with two schedulers: requests move when one is lost, and go nowhere they should not."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path

import aiohttp
import pytest

from frontend.replicas.exposition import merged_expositions
from pagewire.base.errors import Unavailable
from pagewire.client import AsyncClient
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.block_hashes import ROOT_HASH, hash_blocks
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, stop


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[ScriptedScheduler]:
    scheduler = await ScriptedScheduler(str(tmp_path / "other.sock")).start()
    yield scheduler
    await scheduler.stop()


async def start_with(
    start_frontend: FrontendFactory, *schedulers: ScriptedScheduler, ready: int = 2, **settings: object
) -> RunningFrontend:
    """A frontend to which `ready` of these schedulers are ready."""
    targets = ",".join(scheduler.target for scheduler in schedulers)
    frontend = await start_frontend(scheduler=targets, **settings)
    async with asyncio.timeout(5):
        while frontend.link.num_ready < ready or not all(link.heard.is_set() for link in frontend.link.links):
            await asyncio.sleep(0.01)
    return frontend


def one_with_requests(*schedulers: ScriptedScheduler) -> tuple[ScriptedScheduler, ScriptedScheduler]:
    """(the scheduler that got a request, another one)"""
    busy = next(each for each in schedulers if each.submits)
    return busy, next(each for each in schedulers if each is not busy)


async def until_asked(*schedulers: ScriptedScheduler) -> None:
    async with asyncio.timeout(5):
        while not any(each.submits for each in schedulers):
            await asyncio.sleep(0.005)


async def test_requests_of_a_lost_replica_go_on_at_another_with_the_tokens_they_have(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        stream = client.generate("abc", SamplingParams(max_tokens=9, seed=5), stream=True)
        first = asyncio.ensure_future(anext(stream))
        await until_asked(scheduler, other)
        lost, kept = one_with_requests(scheduler, other)
        await lost.say(lost.submits[0].handle, b"xy", cached=2)
        assert (await first).text == "xy"
        await lost.stop()
        again = await kept.submitted()
        assert bytes(again.token_ids) == b"abcxy"
        assert (again.num_prompt_tokens, again.resumed) == (3, True)
        assert again.sampling == lost.submits[0].sampling
        await kept.say(again.handle, [*b"z", EOS], end=stop(EOS), cached=3)
        assert "".join([delta.text async for delta in stream]) == "z"
    assert frontend.link.num_moved == 1
    assert frontend.link.ready


async def test_requests_wait_while_all_replicas_are_lost_and_go_on_at_the_first_that_is_back(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("abc"))
        await until_asked(scheduler, other)
        lost, idle = one_with_requests(scheduler, other)
        await idle.stop()
        await lost.stop()
        back = ScriptedScheduler(idle.target.removeprefix("unix:"))
        back.reply = b"done"
        await back.start()
        assert (await asking).text == "done"
        assert bytes(back.submits[0].token_ids) == b"abc"
        await back.stop()


async def test_a_deadline_holds_after_a_move(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("abc", timeout=1.0))
        await until_asked(scheduler, other)
        lost, kept = one_with_requests(scheduler, other)
        await lost.stop()
        again = await kept.submitted()
        assert 0 < again.timeout < 1.0
        with pytest.raises(Exception, match=r"(?i)deadline"):
            await asking


async def test_prefixes_that_a_replica_has_told_of_attract_requests(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    scheduler.max_model_len = other.max_model_len = 1000
    scheduler.reply = other.reply = b"x"
    frontend = await start_with(start_frontend, scheduler, other)
    prompts = ["ab" * 30, "cd" * 30]
    async with AsyncClient(frontend.target, max_retries=0) as client:
        for text in prompts:
            await client.generate(text)
        for each in (scheduler, other):
            chains = [
                hash_blocks(ROOT_HASH, array("I", submit.token_ids[:48]), 16) for submit in each.submits
            ]
            await each.tell(pb.CacheChanges(cleared=True, stored=b"".join(chain.from_iterable(chains))))
        homes = {bytes(submit.token_ids): each for each in (scheduler, other) for submit in each.submits}
        for _ in range(3):
            for text in prompts:
                await client.generate(text + "?")
        for each in (scheduler, other):
            for submit in each.submits:
                assert homes[bytes(submit.token_ids)[:60]] is each


async def test_a_replica_with_another_model_gets_nothing_and_says_why(
    start_frontend: FrontendFactory,
    scheduler: ScriptedScheduler,
    other: ScriptedScheduler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other.fingerprint = "another"
    scheduler.reply = other.reply = b"x"
    frontend = await start_with(start_frontend, scheduler, other, ready=1)
    async with aiohttp.ClientSession() as session, session.get(f"{frontend.url}/health") as response:
        health = await response.json()
    assert (response.status, health["status"], health["healthy"], health["total"]) == (200, "degraded", 1, 2)
    refused = next(each for each in health["servers"] if not each["healthy"])
    assert refused["reason"] == "it serves another model than the others"
    assert "must serve the same model" in caplog.text
    async with AsyncClient(frontend.target, max_retries=0) as client:
        for _ in range(4):
            await client.generate("abc")
    assert {len(scheduler.submits), len(other.submits)} == {0, 4}


async def test_a_drained_replica_finishes_what_it_has_and_gets_no_more(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("abc"))
        await until_asked(scheduler, other)
        drained, kept = one_with_requests(scheduler, other)
        kept.reply = b"kept"
        name = next(link.name for link in frontend.link.links if link.target == drained.target)
        draining = asyncio.ensure_future(frontend.link.drain(name, 5.0))
        await asyncio.sleep(0)
        for _ in range(3):
            assert (await client.generate("abc")).text == "kept"
        await drained.say(drained.submits[0].handle, [*b"own", EOS], end=stop(EOS))
        assert (await asking).text == "own"
        assert await draining == 0
        frontend.link.undrain(name)
        assert frontend.link.num_ready == 2


async def test_what_is_open_when_a_drain_is_over_goes_on_elsewhere(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("abc"))
        await until_asked(scheduler, other)
        drained, kept = one_with_requests(scheduler, other)
        kept.reply = b"kept"
        handle = drained.submits[0].handle
        name = next(link.name for link in frontend.link.links if link.target == drained.target)
        assert await frontend.link.drain(name, 0.0) == 1
        assert (await asking).text == "kept"
        await drained.aborted(handle)
        last = next(link.name for link in frontend.link.links if link.name != name)
        with pytest.raises(Unavailable, match="nobody would answer"):
            await frontend.link.drain(last, 0.0)


async def test_parts_of_one_answer_share_a_replica(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, other: ScriptedScheduler
) -> None:
    scheduler.reply = other.reply = b"x"
    frontend = await start_with(start_frontend, scheduler, other)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        for _ in range(4):
            await client.generate("abc", SamplingParams(n=6, seed=1))
    assert len(scheduler.submits) % 6 == len(other.submits) % 6 == 0
    assert scheduler.submits
    assert other.submits


def test_metrics_of_a_replica_carry_its_name() -> None:
    one = b'# HELP a A.\n# TYPE a counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{x="y"} 2.0\n'
    two = b"# HELP a A.\n# TYPE a counter\na_total 3.0\n"
    assert merged_expositions([("0", one), ("h:1", two)]).decode() == (
        '# HELP a A.\n# TYPE a counter\na_total{replica="0"} 1.0\na_total{replica="h:1"} 3.0\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="0",x="y"} 2.0\n'
    )
