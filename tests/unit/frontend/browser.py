"""A headless Chromium, Debian's, for the tests of the console."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from playwright.async_api import async_playwright
except ImportError:
    MISSING = "playwright, which the dev extra installs"
else:
    MISSING = "" if CHROMIUM else "Chromium: apt-get install chromium"

needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")


@asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """A browser of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


class Complaints:
    """What a page's console said, and its exceptions.

    Attributes:
        expected: words of those messages that are no fault of the page, such as a 401 before a key is given.
    """

    def __init__(self, page: Page, *expected: str) -> None:
        self.expected = expected
        self._said: list[str] = []
        page.on("console", lambda message: self._said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self._said.append(f"exception: {error}"))

    @property
    def all(self) -> list[str]:
        return [each for each in self._said if not any(words in each for words in self.expected)]


async def open_page(
    context: Browser | BrowserContext, url: str, *expected: str, **options: Any
) -> tuple[Page, Complaints]:
    """A page, and what it complains of."""
    # Without a GPU, what moves costs a processor.
    page = await context.new_page(**{"reduced_motion": "reduce", **options})
    page.set_default_timeout(15_000)
    complaints = Complaints(page, *expected)
    await page.goto(url)
    return page, complaints


async def barriers(page: Page) -> list[str]:
    """What axe-core finds in a page that would keep people out: each serious rule broken, and where."""
    source = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    await page.evaluate(source)  # not a script element, which the page's policy would refuse
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
