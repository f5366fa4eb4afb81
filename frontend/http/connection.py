"""The connection level: what aiohttp answers by itself, in the API's form, and patience with slow clients."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpProcessingError

from frontend.generation.request import check_request_id
from frontend.http.errors import error_response
from frontend.http.failure import Failure

REQUEST_ID_HEADER = "x-request-id"

_NO_PATH = "/"
"""Where nothing is known of the request yet."""

_LINGER = 1.0
"""Seconds in which a client that was too slow may still send, and in which one that is cut off may still read
why."""

_DISCARD_SECONDS = 10.0
_DISCARD_BYTES = 256 * 1024 * 1024
"""How long, and of how much, the rest of a refused body is read and dropped. Many clients read no answer
before they have sent everything, and none at all if the connection is closed while they send."""


class _NoMalformedRequests(logging.Filter):
    """Keeps requests that are not HTTP, which anyone can send, from filling the log with tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


logging.getLogger("aiohttp.server").addFilter(_NoMalformedRequests())


class ApiConnection(web.RequestHandler):
    """One client's connection.

    A client that does not get to the end of a request's headers in time is answered 408 and cut off (its body
    is the middleware's to time); for its first request the time begins with the connection, for others with
    their first byte. Beyond the most connections there may be, a client is answered 503 and cut off.
    """

    __slots__ = ("_head_timeout", "_head_timer", "_max_connections")

    def __init__(self, *arguments: Any, head_timeout: float, max_connections: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._head_timeout = head_timeout
        self._max_connections = max_connections
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._manager is not None
        if len(self._manager.connections) > self._max_connections:
            message = f"this server has {self._max_connections} connections already; try again later"
            failure = Failure(
                status=503, message=message, kind="service_unavailable_error", code="too_many_connections"
            )
            self._cut_off("503 Service Unavailable", failure, "Retry-After: 1\r\n")
            return
        self._head_timer = self._loop.call_later(self._head_timeout, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits_for_head():
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(self._head_timeout, self._give_up)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _waits_for_head(self) -> bool:
        """Whether no request is being served and none is complete enough to be."""
        return self._waiter is not None and not self._waiter.done()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.transport is None or not self._waits_for_head():
            return
        message = f"the request's headers did not arrive within {self._head_timeout:g} s"
        failure = Failure(status=408, message=message, kind="timeout_error", code="request_timeout")
        self._cut_off("408 Request Timeout", failure)

    def _cut_off(self, status: str, failure: Failure, headers: str = "") -> None:
        """Answers, to no request in particular, and closes."""
        assert self.transport is not None
        body = error_response(_NO_PATH, failure).body
        assert isinstance(body, bytes)
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json; charset=utf-8\r\n{headers}"
            f"Content-Length: {len(body)}\r\n{REQUEST_ID_HEADER}: {check_request_id(None)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is no HTTP request. It is the base class that logs."""
        super().handle_error(request, status, exc, message)
        if status < 500:
            text = f"this is not a valid HTTP request: {' '.join((message or 'bad request').split())}"
            failure = Failure(status=status, message=text, code="malformed_http")
        else:
            text = "internal error; the server's log has the details"
            failure = Failure(status=status, message=text, kind="server_error")
        response = error_response(request.path, failure)
        response.headers[REQUEST_ID_HEADER] = check_request_id(None)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Gives what was refused before any middleware ran (such as an unknown Expect header) our shape."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(request.path, Failure.of_http(resp))
        ended = await super().finish_response(request, resp, start_time)
        if not request.content.is_eof():
            # For what was too slow already, not as long.
            await self._discard(request.content, _LINGER if resp.status == 408 else _DISCARD_SECONDS)
        return ended

    async def _discard(self, body: StreamReader, seconds: float) -> None:
        """Reads and drops the rest of a refused body. If that is too much, the server ends its own direction
        and leaves the client the time to read the answer, before the base class closes the connection."""
        self._lingering_time = 0.0  # the base class would do likewise, with no bound on the bytes
        left = _DISCARD_BYTES
        try:
            async with asyncio.timeout(seconds):
                while left > 0 and not body.is_eof():
                    left -= len(await body.readany())
        except (TimeoutError, web.RequestPayloadError):
            pass  # it is cut off
        if body.is_eof() or self.transport is None:
            return
        self.transport.pause_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        await asyncio.sleep(_LINGER)


class _ApiServer(web.Server):
    """Makes an `ApiConnection` for every client."""

    def __call__(self) -> web.RequestHandler:
        return ApiConnection(self, loop=self._loop, **self._kwargs)


class ApiRunner(web.AppRunner):
    """Runs an application over `ApiConnection`s."""

    def __init__(
        self, app: web.Application, *, head_timeout: float, max_connections: int, **settings: Any
    ) -> None:
        super().__init__(app, head_timeout=head_timeout, max_connections=max_connections, **settings)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _ApiServer(server.request_handler, request_factory=server.request_factory, **self._kwargs)
