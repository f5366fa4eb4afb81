"""The console: how its files are served, its events, and both pages in a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.unit.frontend.browser import barriers, launched, needs_browser, open_page
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

if TYPE_CHECKING:
    from playwright.async_api import Page, Route

SOURCES = Path(__file__).parents[3] / "console"
BUILT = files("frontend.http.console").joinpath("static")
REPLY = b"""It is **bold**.

```python
def f(): return 1
```
<img src=x onerror=document.title='owned'> ![p](http://elsewhere.test/p.png) [l](javascript:alert(1))
"""


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


def observation() -> pb.ObserveResponse:
    """Two requests, one of another client, over eight blocks."""
    return pb.ObserveResponse(
        ready=True,
        time=5.0,
        load=pb.GetLoadResponse(num_requests_running=2, num_used_blocks=4, num_blocks=8, max_num_seqs=8),
        totals=pb.ObservedTotals(steps=9, generated_tokens=70, prefix_queries=10, prefix_hits=5),
        inter_token_latency=pb.ObservedLatency(count=3, p50=0.01, p95=0.02),
        steps=[pb.ObservedStep(step_id=9, ended=4.9, execute_us=[9000, 8000], num_decodes=2)],
        requests=[
            pb.ObservedRequest(number=1, request_id="mine", client="/", running=True, max_total_tokens=90),
            pb.ObservedRequest(number=2, request_id="theirs", client="key/user", running=True),
        ],
        blocks=pb.ObservedBlocks(
            stride=1,
            ref_counts=bytes([2, 1, 1, 0, 0, 0, 0, 0]),
            cached=bytes([1, 1, 0, 1, 0, 0, 0, 0]),
            owners=bytes([1, 1, 2, 0, 0, 0, 0, 0]),
        ),
        prefixes=pb.ObservedPrefixes(
            nodes=[pb.ObservedPrefix(first_block=0, parent=-1, num_blocks=2, num_hits=4, num_held=2)],
            roots=bytes([1, 1, 0, 0, 0, 0, 0, 0]),
        ),
    )


async def first_event(session: aiohttp.ClientSession, **headers: str) -> dict[str, Any]:
    async with session.get("/engine/events", headers=headers) as response:
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if line.startswith(b"data: "):
                return json.loads(line[6:])
    raise AssertionError("the stream ended without an event")


def test_the_committed_build_is_of_these_sources() -> None:
    if not SOURCES.is_dir():
        pytest.skip("the sources of the console are not here")
    names = [
        *(
            "engine.html",
            "index.html",
            "package-lock.json",
            "package.json",
            "tsconfig.json",
            "vite.config.js",
        ),
        *(each.relative_to(SOURCES).as_posix() for each in (SOURCES / "src").rglob("*") if each.is_file()),
    ]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + (SOURCES / name).read_bytes())
    recorded = BUILT.joinpath("sources.sha256").read_text().strip()
    assert digest.hexdigest() == recorded, "console/ has changed: run `make console` and commit its work"


async def test_pages_and_their_files_need_no_key_and_are_strict(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(api_keys=("secret",))
    size = 0
    async with aiohttp.ClientSession(frontend.url, auto_decompress=False) as session:
        names = set()
        for path in ("/", "/engine"):
            async with session.get(path, headers={"accept-encoding": "identity"}) as response:
                page = await response.text()
                assert response.content_type == "text/html"
                assert response.headers["cache-control"] == "no-cache"
                assert "script-src 'self';" in response.headers["content-security-policy"]
                etag = response.headers["etag"]
            async with session.get(path, headers={"if-none-match": etag}) as response:
                assert response.status == 304
            assert not re.search(r"<script(?![^>]* src=)|style=|https?://", page)
            names |= set(re.findall(r'(?:src|href)="\./(assets/[^"]+)"', page))
        assert len(names) >= 5
        for name in names:
            async with session.get(f"/{name}", headers={"accept-encoding": "gzip"}) as response:
                assert response.status == 200, name
                assert "immutable" in response.headers["cache-control"]
                assert response.headers["content-encoding"] == "gzip"
                size += len(await response.read())
        async with session.get("/assets/../engine.html") as response:
            assert response.status in (401, 404)
        async with session.get("/assets/nothing.js") as response:
            assert response.status == 404
    assert size < 250_000


async def test_events_need_a_key_and_tell_no_ids_of_others(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory, http
) -> None:
    scheduler.observation = observation()
    event = await first_event(http)
    assert (event["state"], event["load"]["num_blocks"], event["itl"]["count"]) == ("serving", 8, 3)
    assert [each["request_id"] for each in event["requests"]] == ["mine", None]
    assert list(base64.b64decode(event["blocks"]["owners"])) == [1, 1, 2, 0, 0, 0, 0, 0]
    assert event["prefixes"]["nodes"] == [[0, -1, 2, 4, 2]]
    with_key = await start_frontend(api_keys=("secret",))
    async with aiohttp.ClientSession(with_key.url) as session:
        async with session.get("/engine/events") as response:
            assert response.status == 401
        event = await first_event(session, authorization="Bearer secret")
        assert [each["request_id"] for each in event["requests"]] == [None, None]


async def test_many_watchers_are_one_observer_and_none_is_none(scheduler: ScriptedScheduler, http) -> None:
    assert scheduler.num_observers == 0
    streams = [await http.get("/engine/events") for _ in range(3)]
    for stream in streams:
        await stream.content.readuntil(b"\n\n")
    assert scheduler.num_observers == 1
    for stream in streams:
        stream.close()
    async with asyncio.timeout(5):
        while scheduler.num_observers:
            await asyncio.sleep(0.02)


async def test_a_lost_scheduler_is_told_and_the_stream_goes_on(scheduler: ScriptedScheduler, http) -> None:
    async with http.get("/engine/events") as stream:
        assert b"serving" in await stream.content.readuntil(b"\n\n")
        await scheduler.stop()
        async with asyncio.timeout(10):
            while b"no_scheduler" not in await stream.content.readuntil(b"\n\n"):
                pass
            await scheduler.start()
            while b"serving" not in await stream.content.readuntil(b"\n\n"):
                pass


async def test_a_frontend_that_drains_ends_the_stream(frontend: RunningFrontend, http) -> None:
    async with http.get("/engine/events") as stream:
        await stream.content.readuntil(b"\n\n")
        await frontend.pipeline.drain(0)
        async with asyncio.timeout(5):
            await stream.read()


@needs_browser
async def test_chat_in_a_browser(scheduler: ScriptedScheduler, start_frontend: FrontendFactory) -> None:
    """Asks for the key; streams; shows Markdown and nothing that could run; keeps branches over a reload."""
    scheduler.reply, scheduler.max_model_len = REPLY, 2000
    frontend = await start_frontend(api_keys=("secret",))
    async with launched() as browser:
        page, complaints = await open_page(browser, frontend.url, "status of 401")
        key = page.get_by_role("textbox", name="API key")
        await key.fill("wrong")
        await key.press("Enter")
        await page.get_by_text("That key is not accepted.").wait_for()
        await key.fill("secret")
        await key.press("Enter")
        message = page.get_by_label("Your message")
        await message.fill("Tell me")
        await message.press("Enter")
        await page.get_by_text("tokens/s").wait_for()
        answer = page.locator(".prose").last
        assert await answer.locator("strong").inner_text() == "bold"
        assert await answer.locator(".hljs-keyword").first.inner_text() == "def"
        assert await answer.locator("img").count() == 0
        assert await answer.locator("a[href^=javascript]").count() == 0
        await answer.get_by_role("button", name="Copy").click()
        await answer.get_by_role("button", name="Copied").wait_for()
        await page.get_by_role("button", name="Regenerate").click()
        await page.get_by_text("2 / 2").wait_for()
        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Edit your message").fill("Tell me more")
        await page.get_by_role("button", name="Send").first.click()
        await page.get_by_text("2 / 2").wait_for()
        await page.get_by_text("tokens/s").wait_for()
        assert await barriers(page) == []
        await page.reload()
        await page.locator(".bubble", has_text="Tell me more").wait_for()
        await page.get_by_role("button", name="Earlier version").first.click()
        await page.locator(".bubble", has_text=re.compile(r"^Tell me$")).wait_for()
        assert complaints.all == []
        assert await page.title() == "pagewire"
    assert b"Tell me more" in bytes(scheduler.submits[-1].token_ids)


@needs_browser
async def test_an_answer_can_be_stopped_and_errors_are_in_words(
    scheduler: ScriptedScheduler, frontend: RunningFrontend
) -> None:
    async with launched() as browser:
        page, complaints = await open_page(browser, frontend.url, "status of 400")
        message = page.get_by_label("Your message")
        await message.fill("Go")
        await message.press("Enter")
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, b"some words")
        await page.locator(".prose", has_text="some words").wait_for()
        await scheduler.lose_engine()
        await page.get_by_text("The engine is away").wait_for()
        await scheduler.attach_engine()
        await page.get_by_text("The engine is away").wait_for(state="detached")
        await page.keyboard.press("Escape")
        await page.get_by_text("You stopped this answer.").wait_for()
        async with asyncio.timeout(5):
            while not scheduler.aborts:
                await asyncio.sleep(0.02)
        await message.fill("long " * 60)
        await message.press("Enter")
        await page.get_by_text("The server did not take this").wait_for()
        await check_thoughts_and_calls(page)
        assert complaints.all == []


async def check_thoughts_and_calls(page: Page) -> None:
    """Thoughts fold away; a call is shown, and what is typed as its result is sent with the next request."""
    sent: list[dict[str, Any]] = []
    call = {
        "index": 0,
        "id": "call-1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"a":1}'},
    }

    async def answer(route: Route) -> None:
        sent.append(route.request.post_data_json)
        deltas = [{"reasoning_content": "Let me look."}, {"tool_calls": [call]}] if len(sent) == 1 else []
        reason = "tool_calls" if deltas else "stop"
        chunks = [{"choices": [{"delta": delta}]} for delta in deltas or [{"content": "It is there."}]]
        chunks.append({"choices": [{"delta": {}, "finish_reason": reason}]})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        await route.fulfill(content_type="text/event-stream", body=body)

    await page.route("**/v1/chat/completions", answer)
    await page.get_by_role("button", name="New chat").click()
    await page.get_by_label("Your message").fill("Where?")
    await page.get_by_label("Your message").press("Enter")
    await page.get_by_text("Thought for").click()
    await page.get_by_text("Let me look.").wait_for()
    await page.get_by_label("Result of look").fill("over there")
    await page.get_by_role("button", name="Give the result").click()
    await page.get_by_text("It is there.").wait_for()
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "tool"]
    assert sent[1]["messages"][2] == {"role": "tool", "tool_call_id": "call-1", "content": "over there"}


@needs_browser
async def test_the_engine_in_a_browser(scheduler: ScriptedScheduler, start_frontend: FrontendFactory) -> None:
    scheduler.observation = observation()
    scheduler.adapters = [pb.Adapter(adapter_id=3, name="sql", path="/adapters/sql")]
    frontend = await start_frontend()
    async with launched() as browser:
        page, complaints = await open_page(browser, f"{frontend.url}/engine", color_scheme="dark")
        await page.get_by_text("4 of 8 held").wait_for()
        await page.get_by_text("2 ranks", exact=True).wait_for()
        await page.get_by_text("mine").wait_for()
        await page.get_by_text("on bytes, from /adapters/sql").wait_for()
        assert await page.get_by_text("theirs").count() == 0
        assert await page.locator(".tree li").count() == 1
        painted = """() => { const canvas = document.querySelector('canvas');
            return new Set(new Uint32Array(canvas.getContext('2d').getImageData(
                0, 0, canvas.width, canvas.height).data.buffer)).size }"""
        assert await page.evaluate(painted) > 3
        await page.get_by_role("button", name="By cached prefix").click()
        assert await barriers(page) == []
        scheduler.observation = pb.ObserveResponse(time=6.0, load=pb.GetLoadResponse(num_requests_waiting=2))
        await page.get_by_text("No engine is attached. 2 requests keep their tokens").wait_for()
        assert complaints.all == []
