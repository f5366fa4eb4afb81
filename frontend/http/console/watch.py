"""GET /engine/events: what the scheduler does, as server-sent events.

However many watch, a frontend observes the scheduler once, and not at all while nobody watches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from frontend.caller import client_of
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.console.events import engine_event
from frontend.http.event_stream import EventStream
from frontend.http.json_text import json_text
from frontend.http.request_id import REQUEST_ID
from pagewire.base.errors import Overloaded, PagewireError
from pagewire.scheduler.v1 import scheduler_pb2

logger = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two events."""

MAX_WATCHERS = 32
"""Streams at once, in one frontend."""


class EngineWatch:
    """Observes the scheduler while somebody watches, and tells all who do."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout
        self._num_watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._message: scheduler_pb2.ObserveResponse | None = None
        self._prefixes: scheduler_pb2.ObservedPrefixes | None = None
        self._why = ""

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /engine/events

        Raises:
            Overloaded: too many watch.
        """
        if self._num_watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} streams watch the engine already; close some of them")
        stream = EventStream(request, request_id=request[REQUEST_ID], stall_timeout=self._stall_timeout)
        self._num_watchers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._observe(), name="engine-watch")
            return await stream.send(self._frames(client_of(None)), failed=_failed)
        finally:
            self._num_watchers -= 1
            if not self._num_watchers and self._task is not None:
                self._task.cancel()
                self._task, self._message, self._prefixes = None, None, None

    async def _frames(self, own: str) -> AsyncGenerator[bytes, None]:
        """The events for one who watches; who lags misses some. They end when this frontend is to end."""
        prefixes = self._prefixes
        yield b""
        while not (self._pipeline.leaving or self._pipeline.draining):
            await self._news.wait()
            message = self._message
            told = engine_event(message, prefixes if message else None, own=own, why=self._why)
            prefixes = None
            yield b"data: " + json_text(told).encode() + b"\n\n"

    def _tell(self, message: scheduler_pb2.ObserveResponse | None, why: str = "") -> None:
        """Wakes all who wait for news; those who come to wait later get the next ones."""
        self._message, self._why = message, why
        if message is not None and message.HasField("prefixes"):
            self._prefixes = message.prefixes
        self._news.set()
        self._news = asyncio.Event()

    async def _observe(self) -> None:
        while True:
            try:
                async with aclosing(self._pipeline.link.observe(INTERVAL)) as messages:
                    async for message in messages:
                        self._tell(message)
                why = "the scheduler ended the stream"
            except PagewireError as error:
                why = error.message
            logger.debug("the scheduler is not observed: %s", why)
            self._prefixes = None
            self._tell(None, why)
            await asyncio.sleep(INTERVAL)


def _failed(error: PagewireError) -> bytes:
    return b"data: " + json_text({"state": "no_scheduler", "why": error.message}).encode() + b"\n\n"
