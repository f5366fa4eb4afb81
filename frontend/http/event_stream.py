"""Server-sent events: how a stream begins, goes on and, if it must, fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext

from aiohttp import HttpVersion11, web

from pagewire.base.errors import PagewireError

logger = logging.getLogger(__name__)

LAGGING_BYTES = 1 << 16
"""A client that more waits for lags: its stream waits for it, and further tokens go into fewer frames."""

PING_INTERVAL = web.AppKey("ping_interval", float)
"""Where the application keeps how many seconds a stream may be silent; 0 is for ever."""

_COMMENT = b": ping\n\n"
"""What readers of server-sent events skip (HTML, 9.2.6), and proxies take for a sign of life."""


class EventStream:
    """The answer to one request, an event at a time.

    Frames go two ways. `send` writes what a generator yields, and waits for a client that lags. `write` puts
    a frame on its way at once, without a switch of tasks; it is for whoever finds the stream `ready`. While
    neither has anything to write, pings are sent, so that nobody on the way takes the connection for dead.
    """

    def __init__(
        self,
        http_request: web.Request,
        *,
        request_id: str,
        stall_timeout: float,
        media_type: str = "text/event-stream",
        ping: bytes | None = None,
    ) -> None:
        """Args:
        http_request: what is answered.
        request_id: for logs.
        stall_timeout: seconds that a client may take nothing of what waits for it until it is given up.
        media_type: what the frames are together.
        ping: a frame that means nothing, empty for none; default a comment in server-sent events, and none in
            other media.
        """
        self._http_request = http_request
        self._request_id = request_id
        self._stall_timeout = stall_timeout
        self._response = web.StreamResponse(
            headers={
                "Content-Type": f"{media_type}; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self._chunked = http_request.version >= HttpVersion11
        if self._chunked:
            self._response.enable_chunked_encoding()
        self._transport: asyncio.Transport | None = None
        if ping is None:
            ping = _COMMENT if media_type == "text/event-stream" else b""
        self._ping = ping
        self._silent = False
        self._timer: asyncio.TimerHandle | None = None
        self._first_ping: asyncio.Task[None] | None = None

    def ready(self) -> bool:
        """Whether the stream has begun and its client keeps up."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        return transport.get_write_buffer_size() < LAGGING_BYTES

    def write(self, frame: bytes) -> None:
        """Writes frames, which are not empty, to a stream that is ready."""
        assert self._transport is not None
        self._silent = False
        self._transport.write(b"%x\r\n%b\r\n" % (len(frame), frame) if self._chunked else frame)

    async def send(
        self, frames: AsyncGenerator[bytes, None], *, failed: Callable[[PagewireError], bytes]
    ) -> web.StreamResponse:
        """Writes frames as they come. Headers go out with the first, so that a request the scheduler refuses
        gets its proper status; or with a ping, if the first frame does not come before that is due.

        Args:
            frames: the events; empty ones only let the headers out.
            failed: makes the last frame of a stream that fails after it began; the connection is closed then.
        """
        response = self._response
        if self._ping and (interval := self._http_request.app[PING_INTERVAL]):
            self._look_later(interval / 2)
        try:
            try:
                async with aclosing(frames):
                    async for frame in frames:
                        if not response.prepared:
                            await response.prepare(self._http_request)
                        if frame:
                            await self._write_or_wait(frame)
            finally:
                await self._end_pings()
        except PagewireError as error:
            if not response.prepared:
                raise
            await self._fail(failed(error))
        except ConnectionError:
            logger.debug("request %s: the client is gone", self._request_id)
        except Exception:
            if not response.prepared:
                raise
            logger.exception("request %s failed while it was streamed", self._request_id)
            unexpected = PagewireError("internal error; the server's log has the details")
            await self._fail(failed(unexpected))
        else:
            with self._watched():
                await response.write_eof()
        return response

    async def _write_or_wait(self, frame: bytes) -> None:
        """Writes a frame; returns when the client has taken enough of what came before it."""
        if self.ready():
            self.write(frame)
            return
        if self._first_ping is not None:
            await self._first_ping
        self._silent = False
        with self._watched():
            await self._response.write(frame)
        # From the first frame on, which the headers had to go with, frames may be written without waiting.
        self._transport = self._http_request.transport

    def _look_later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look, seconds)

    def _look(self, half: float) -> None:
        """Twice an interval: sends a ping if nothing was written since the time before. So a write costs no
        look at the clock, and a silence lasts an interval at most."""
        self._look_later(half)
        transport = self._transport
        if not self._silent:
            self._silent = True
        elif transport is None:
            if self._first_ping is None:
                self._first_ping = asyncio.create_task(self._begin_with_ping())
        elif not transport.is_closing() and not transport.get_write_buffer_size():
            self.write(self._ping)

    async def _begin_with_ping(self) -> None:
        self._silent = False
        try:
            if not self._response.prepared:
                await self._response.prepare(self._http_request)
            with self._watched():
                await self._response.write(self._ping)
        except ConnectionError:
            logger.debug("request %s: the client is gone", self._request_id)
        else:
            self._transport = self._http_request.transport

    async def _end_pings(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._first_ping is not None:
            await self._first_ping  # which may have sent the headers, and so decided on the status

    def _watched(self) -> AbstractContextManager[object]:
        transport = self._http_request.transport
        if transport is None:
            return nullcontext()
        return _StallWatch(transport, self._stall_timeout, self._request_id)

    async def _fail(self, frame: bytes) -> None:
        """The status went out long ago: a last frame, then the connection is closed."""
        response, transport = self._response, self._http_request.transport
        response.force_close()
        with self._watched():
            await response.write(frame)
            await response.write_eof()
        if transport is not None:
            transport.close()


class _StallWatch:
    """Closes a connection whose client takes nothing for too long, while somebody waits for it. Its handler
    is cancelled by that, as when a client leaves."""

    def __init__(self, transport: asyncio.Transport, seconds: float, request_id: str) -> None:
        self._transport = transport
        self._seconds = seconds
        self._request_id = request_id

    def __enter__(self) -> None:
        self._size = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() < self._size:
            self.__enter__()
            return
        logger.info("request %s: the client took nothing for %g s", self._request_id, self._seconds)
        self._transport.abort()
