"""A stream that has nothing to say for a while says so, so that nobody on the way takes it for dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import aiohttp
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from frontend.config import FrontendConfig
from frontend.http.event_stream import PING_INTERVAL, EventStream
from pagewire.base.errors import Code, ConfigError, PagewireError
from tests.unit.frontend.conftest import FrontendFactory
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure, stop

INTERVAL = 0.2
PING = b": ping\n\n"
USER = [{"role": "user", "content": "p"}]
BODIES = {
    "/v1/completions": {"prompt": "p", "max_tokens": 9},
    "/v1/chat/completions": {"messages": USER, "max_tokens": 9},
    "/v1/responses": {"input": "p", "max_output_tokens": 9},
}


@pytest.mark.parametrize("path", BODIES)
async def test_pings_come_before_the_first_token_and_between_tokens(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, path: str
) -> None:
    frontend = await start_frontend(sse_ping_interval=INTERVAL)
    async with aiohttp.ClientSession(frontend.url) as session:
        began = time.monotonic()
        async with session.post(path, json={**BODIES[path], "stream": True}) as response:
            assert response.status == 200
            assert await response.content.readexactly(len(PING)) == PING
            assert await response.content.readexactly(len(PING)) == PING
            assert time.monotonic() - began < 2.5 * INTERVAL + 1
            submit = await scheduler.submitted()
            await scheduler.say(submit.handle, b"hi")
            silent = await response.content.readuntil(PING)
            assert b'"hi"' in silent
            await scheduler.say(submit.handle, [*b" ho", EOS], end=stop(EOS))
            rest = await response.content.read()
            assert b'" ho"' in rest
            assert PING not in rest


async def test_openais_client_reads_on_over_pings(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(sse_ping_interval=0.05)
    client = openai.AsyncOpenAI(base_url=frontend.url + "/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(model="bytes", messages=USER, stream=True)  # type: ignore[arg-type]
    submit = await scheduler.submitted()
    for token in b"abc":
        await asyncio.sleep(0.12)
        await scheduler.say(submit.handle, [token])
    await scheduler.say(submit.handle, [EOS], end=stop(EOS))
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "abc"
    await client.close()


async def test_a_stream_that_is_never_silent_gets_no_ping(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply, scheduler.pause_between_tokens = b"x" * 40, 0.02
    frontend = await start_frontend(sse_ping_interval=0.6)
    async with aiohttp.ClientSession(frontend.url) as session:
        body = {"prompt": "p", "stream": True, "max_tokens": 40}
        async with session.post("/v1/completions", json=body) as response:
            text = await response.text()
    assert text.count("data: ") > 20
    assert "ping" not in text


async def test_no_pings_if_they_are_turned_off(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(sse_ping_interval=0)
    async with aiohttp.ClientSession(frontend.url) as session:
        body = {"prompt": "p", "stream": True}
        asking = asyncio.create_task(session.post("/v1/completions", json=body))
        submit = await scheduler.submitted()
        await asyncio.sleep(0.3)
        assert not asking.done()
        await scheduler.say(submit.handle, [EOS], end=stop(EOS))
        assert "ping" not in await (await asking).text()


async def test_a_failure_after_the_first_ping_is_an_event_and_ends_the_connection(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(sse_ping_interval=0.1)
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post("/v1/completions", json={"prompt": "p", "stream": True}) as response:
            assert response.status == 200
            submit = await scheduler.submitted()
            await scheduler.say(submit.handle, [], end=failure(Code.UNAVAILABLE, "the engine is gone"))
            text = await response.text()
    assert "the engine is gone" in text.split("data: ")[-1]


async def test_a_client_that_leaves_during_the_silence_aborts_its_request(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(sse_ping_interval=0.1)
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post("/v1/completions", json={"prompt": "p", "stream": True}) as response:
            await response.content.readexactly(len(PING))
            response.close()
    await scheduler.aborted((await scheduler.submitted()).handle)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"media_type": "application/x-ndjson"}, b"end"),
        ({"ping": b"event: ping\n\n"}, b"event: ping\n\nend"),
        ({"ping": b""}, b"end"),
    ],
)
async def test_other_streams_have_pings_of_their_own_or_none(settings, expected: bytes) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        async def frames() -> AsyncGenerator[bytes, None]:
            await asyncio.sleep(0.35)
            yield b"end"

        stream = EventStream(request, request_id="x", stall_timeout=1, **settings)
        return await stream.send(frames(), failed=lambda error: b"")

    app = web.Application()
    app[PING_INTERVAL] = 0.3
    app.router.add_get("/", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.get(server.make_url("/")) as response:
            assert await response.read() == expected


async def test_a_refusal_at_the_moment_of_the_first_ping_is_answered_once() -> None:
    """The ping is due, and its task has yet to run: the answer is a stream by then."""
    streams: list[EventStream] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        async def frames() -> AsyncGenerator[bytes, None]:
            streams[0]._silent = True
            streams[0]._look(100)
            raise PagewireError("refused")
            yield b""

        streams.append(EventStream(request, request_id="x", stall_timeout=1))
        return await streams[0].send(frames(), failed=lambda error: error.message.encode())

    app = web.Application()
    app[PING_INTERVAL] = 100.0
    app.router.add_get("/", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.get(server.make_url("/")) as response:
            assert (response.status, await response.read()) == (200, PING + b"refused")


def test_an_interval_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="sse_ping_interval"):
        FrontendConfig(model="m", scheduler="s", sse_ping_interval=-1)
