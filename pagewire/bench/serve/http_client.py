"""An HTTP/1.1 client for streams: one request on a connection at a time, connections kept and used again.

It is a bare asyncio protocol, because what it costs is taken from what can be measured: bytes get their time
of arrival first and are parsed after.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

from pagewire.base.errors import ConfigError, Unavailable
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.http_wire import BadResponse, EventSplitter, ResponseDecoder
from pagewire.bench.serve.openai_events import EventReader, message_of
from pagewire.bench.serve.target import Target

MAX_ERROR_BODY = 64 * 1024
MAX_CONNECTING = 64
"""Connections that are opened at once: a server's queue for them has often 128 places, and who finds it full
tries again a second later."""


class HttpClient:
    """Sends requests to one server. Use it from one event loop."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tls = target.tls()
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting = asyncio.Semaphore(MAX_CONNECTING)
        endpoint = target.path("chat/completions" if target.chat else "completions")
        self._head = _head("POST", endpoint, target) + b"Content-Type: application/json\r\nContent-Length: "

    async def models(self) -> list[str]:
        """The models that the server lists.

        Raises:
            ConfigError: it lists none, or does not let us see them.
            Unavailable: it cannot be reached.
        """
        exchange = _Exchange()
        await self._send(_head("GET", self._target.path("models"), self._target) + b"\r\n", exchange)
        if exchange.failure:
            raise Unavailable(f"{self._target.url}: {exchange.failure}")
        try:
            names = [model["id"] for model in json.loads(bytes(exchange.body))["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if exchange.status != 200 or not names:
            said = message_of(bytes(exchange.body))
            raise ConfigError(f"{self._target.url}: lists no models (HTTP {exchange.status}: {said})")
        return names

    async def prepare(self, connections: int) -> None:
        """Opens connections ahead, so that a run that sends many requests at once measures no handshakes.

        Raises:
            Unavailable: the server cannot be reached.
        """
        try:
            fresh = await asyncio.gather(*(self._connect() for _ in range(connections - len(self._idle))))
        except OSError as error:
            raise Unavailable(f"{self._target.url}: {_reason(error)}") from error
        self._idle += fresh

    def request(self, prompt: list[int] | str, max_tokens: int) -> bytes:
        """What to give to `send`: a whole request."""
        body = self._target.body(prompt, max_tokens)
        return b"%s%d\r\n\r\n%s" % (self._head, len(body), body)

    async def send(self, request: bytes, answer: Answer) -> None:
        """Sends a request and fills the answer until it ends. Failures are written there, too."""
        answer.sent = time.perf_counter()
        exchange = _Exchange(EventReader(answer, chat=self._target.chat), answer)
        await self._send(request, exchange)

    async def _send(self, request: bytes, exchange: _Exchange) -> None:
        deadline = asyncio.get_running_loop().time() + self._target.timeout
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    connection = self._idle.pop() if self._idle else None
                    is_used = connection is not None
                    connection = connection or await self._connect()
                    try:
                        await connection.exchange(request, exchange)
                    except asyncio.CancelledError:
                        connection.abort()
                        raise
                    # A server may close a connection that it has kept, just as we send on it.
                    if not (exchange.failure and is_used and not exchange.has_begun):
                        break
                    exchange.again()
        except TimeoutError:
            exchange.fail(f"timeout: no end after {self._target.timeout:g} s")
        except OSError as error:
            exchange.fail(f"cannot connect: {_reason(error)}")
        exchange.settle()

    async def _connect(self) -> _Connection:
        target = self._target
        async with self._connecting:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), target.host, target.port, ssl=self._tls
            )
        return connection

    def opened(self, connection: _Connection) -> None:
        """Told by a connection."""
        self._open.add(connection)

    def released(self, connection: _Connection) -> None:
        """Told by a connection that can take another request."""
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """Told by a connection that is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def close(self) -> None:
        """Closes every connection."""
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()


class _Exchange:
    """One request's way: what of its answer is for the reader, and what is an error's text."""

    __slots__ = ("_answer", "_reader", "_splitter", "body", "failure", "has_begun", "is_stream", "status")

    def __init__(self, reader: EventReader | None = None, answer: Answer | None = None) -> None:
        self._reader = reader
        self._answer = answer
        self._splitter = EventSplitter()
        self.body = bytearray()
        self.failure = ""
        self.has_begun = False
        self.is_stream = False
        self.status = 0

    def again(self) -> None:
        """The connection failed before it said anything: another one gets the request."""
        self.failure = ""
        if self._answer is not None:
            self._answer.retries += 1

    def head(self, decoder: ResponseDecoder) -> None:
        """The response's head is there."""
        self.status = decoder.status
        kind = decoder.headers.get("content-type", "")
        self.is_stream = self.status == 200 and kind.startswith("text/event-stream")

    def data(self, body: bytes, now: float) -> None:
        """More of the body."""
        if self.is_stream and self._reader is not None:
            self._reader.read(self._splitter.feed(body), now)
        elif len(self.body) < MAX_ERROR_BODY:
            self.body += body

    def fail(self, reason: str) -> None:
        """The exchange cannot go on."""
        self.failure = self.failure or reason

    def settle(self) -> None:
        """Nothing more will come: writes how it ended into the answer."""
        answer, now = self._answer, time.perf_counter()
        if answer is None or self._reader is None:
            return
        if self.failure:
            if math.isnan(answer.ended) or not answer.finish_reason:
                answer.fail(self.failure, now)
        elif self.is_stream:
            self._reader.end(now)
        elif self.status == 200:
            answer.fail("HTTP 200, but not a stream of events", now)
        else:
            answer.fail(f"HTTP {self.status}: {message_of(bytes(self.body))}", now)


class _Connection(asyncio.Protocol):
    """A connection, with at most one exchange on it."""

    __slots__ = ("_client", "_decoder", "_done", "_exchange", "_transport")

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._transport: Any = None
        self._exchange: _Exchange | None = None
        self._decoder = ResponseDecoder()
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, exchange: _Exchange) -> None:
        """Sends a request; returns when its answer, or the connection, has ended."""
        if self._transport.is_closing():
            exchange.fail("connection lost: closed by the server")
            return
        self._exchange, self._decoder = exchange, ResponseDecoder()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def abort(self) -> None:
        """Closes the connection at once."""
        self._exchange = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        self._transport = transport
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        now = time.perf_counter()
        exchange = self._exchange
        if exchange is None:
            self._transport.abort()  # nobody asked
            return
        try:
            body = self._decoder.feed(data)
        except BadResponse as error:
            exchange.has_begun = True
            exchange.fail(f"bad HTTP: {error}")
            self._transport.abort()
            return
        if not exchange.has_begun:
            exchange.has_begun = bool(self._decoder.status)
            if exchange.has_begun:
                exchange.head(self._decoder)
        if body:
            exchange.data(body, now)
        if self._decoder.is_complete:
            self._finish()

    def eof_received(self) -> bool:
        """Of asyncio.Protocol."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self._client.lost(self)
        if self._exchange is None:
            return
        try:
            self._decoder.end()
        except BadResponse as bad:
            self._exchange.fail(f"connection lost: {_reason(error)}" if error else f"connection lost: {bad}")
        self._finish()

    def _finish(self) -> None:
        self._exchange = None
        if self._transport.is_closing():
            pass
        elif self._decoder.keeps_alive:
            self._client.released(self)
        else:
            self._transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def _head(method: str, path: str, target: Target) -> bytes:
    headers = {"host": target.authority, "accept": "*/*", **{n.lower(): v for n, v in target.headers}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n").encode("latin-1")


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
