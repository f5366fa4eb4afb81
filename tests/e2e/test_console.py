"""The console before a real service under load: what people see of it, also while a worker is killed.

The pictures in docs/pictures/ are made here: `pytest tests/e2e/test_console.py --pictures docs/pictures`.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.unit.frontend.browser import barriers, launched, needs_browser, open_page
from tools.service import Service

pytestmark = [pytest.mark.slow, needs_browser]

LOOKS = {
    "light": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
SYSTEMS = [
    words * times for words, times in (("Book a train. ", 60), ("Explain code. ", 90), ("Be brief. ", 40))
]
NUM_CLIENTS = 36
QUESTIONS = (
    "Write a Python function that reverses a string.",
    "List three reasons to learn Python. Use Markdown.",
)


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where pictures go."""
    return Path(request.config.getoption("--pictures") or tmp_path)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """A service as busy as a GPU, without a model: 24 requests at once, a token each 25 ms."""
    options = ("--engine", "null", "--null-step-ms", "25", "--null-prompt-us", "200", "--num-blocks", "3000")
    with Service(tmp_path_factory.mktemp("busy"), options=(*options, "--max-num-seqs", "24")) as service:
        yield service


async def converse(client: httpx.AsyncClient, seed: int) -> None:
    """Conversations of several turns that share their system prompts, one after the other."""
    chance = random.Random(seed)
    while True:
        messages = [{"role": "system", "content": chance.choice(SYSTEMS)}]
        for _ in range(chance.randint(1, 4)):
            question = " ".join(
                chance.choices(("river", "tree", "list", "city", "sort"), k=chance.randint(9, 80))
            )
            messages.append({"role": "user", "content": question})
            body = {
                "messages": messages,
                "max_tokens": chance.randint(30, 300),
                "seed": chance.getrandbits(30),
            }
            answer = await client.post("/v1/chat/completions", json=body)
            content = answer.json()["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": content})


@asynccontextmanager
async def load(service: Service) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=service.http_url, timeout=120) as client:
        tasks = [asyncio.create_task(converse(client, seed)) for seed in range(NUM_CLIENTS)]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_engine_under_load_in_every_look(busy: Service, pictures: Path) -> None:
    async with load(busy), launched() as browser:
        for look, options in LOOKS.items():
            page, complaints = await open_page(browser, f"{busy.http_url}/engine", **options)
            await page.get_by_text("24 of 24 rows run").wait_for()
            await page.locator(".tree li").nth(5).wait_for()
            await asyncio.sleep(40 if look == "light" else 12)  # until the charts show something
            await page.screenshot(path=pictures / f"engine-{look}.png", full_page=look != "phone")
            assert await barriers(page) == [], look
            assert complaints.all == [], look
            wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not await page.evaluate(wide), look
            await page.close()


async def test_a_chat_in_every_look(server: Service, pictures: Path) -> None:
    async with launched() as browser:
        page, complaints = await open_page(browser, server.http_url)
        page.set_default_timeout(120_000)
        assert await barriers(page) == []
        await page.get_by_role("button", name="Settings", exact=True).click()
        await page.get_by_label("Temperature").fill("0")
        assert await barriers(page) == []
        await page.get_by_role("button", name="Close settings").click()
        for count, question in enumerate(QUESTIONS):
            await page.get_by_label("Your message").fill(question)
            await page.get_by_role("button", name="Send", exact=True).click()
            await page.locator(".numbers").nth(count).wait_for()
        for look, options in LOOKS.items():
            await page.set_viewport_size(options["viewport"])
            await page.emulate_media(color_scheme=options["color_scheme"])
            await page.locator(".hljs-keyword").first.wait_for()
            await page.screenshot(path=pictures / f"chat-{look}.png")
            assert await barriers(page) == [], look
        assert complaints.all == []


async def test_an_answer_goes_on_after_its_worker_was_killed(busy: Service) -> None:
    async with launched() as browser:
        page, complaints = await open_page(browser, busy.http_url)
        watching, more = await open_page(browser, f"{busy.http_url}/engine")
        await page.get_by_label("Your message").fill("Go on")
        await page.get_by_label("Your message").press("Enter")
        await page.locator(".prose.live").wait_for()
        busy.processes()["engine-worker"].send_signal(signal.SIGKILL)
        await watching.get_by_text("No engine is attached.").first.wait_for()
        await watching.locator(".pill.ready").wait_for(timeout=60_000)
        before = await page.locator(".prose").inner_text()
        async with asyncio.timeout(60):
            while len(after := await page.locator(".prose").inner_text()) <= len(before) + 100:
                await asyncio.sleep(0.1)
        assert after.startswith(before)
        await page.keyboard.press("Escape")
        await page.get_by_text("You stopped this answer.").wait_for()
        assert (complaints.all, more.all) == ([], [])


async def test_a_refusal_says_when_to_come_back(busy: Service) -> None:
    async with launched() as browser:
        page, _ = await open_page(browser, busy.http_url, "503", "429")
        await page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                status=429,
                headers={"retry-after": "7"},
                json={"error": {"message": "1024 requests are waiting"}},
            ),
        )
        await page.get_by_label("Your message").fill("Hello")
        await page.get_by_label("Your message").press("Enter")
        await page.get_by_text(
            "no room right now: 1024 requests are waiting. Try again in about 7 s"
        ).wait_for()
