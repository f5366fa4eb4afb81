"""A client of pagewire's gRPC for load: many calls on a few HTTP/2 connections, parsed with little work.

It is not grpc's own client, whose asyncio API takes several times the processor time for a token
(docs/benchmarks.md has the figures) and so would be the limit of what is measured.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from pagewire.base.errors import Code, ConfigError, Unavailable
from pagewire.bench.serve.answer import Answer
from pagewire.bench.serve.http2_wire import BadHttp2, Http2Client, encode_headers
from pagewire.bench.serve.target import Target
from pagewire.inference.v1 import inference_pb2 as pb

_SERVICE = "/pagewire.inference.v1.InferenceService/"
_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class GrpcClient:
    """Sends requests to one server. Use it from one event loop."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tls = target.tls()
        self._connections: list[_Connection] = []
        self._opening = asyncio.Lock()
        self._turn = 0
        self._generate = self._header_block("Generate")

    async def models(self) -> list[str]:
        """The models that the server lists.

        Raises:
            ConfigError: it lists none, or does not let us see them.
            Unavailable: it cannot be reached.
        """
        messages: list[bytes] = []
        call = _Call(lambda message, _: messages.append(message))
        await self._send(self._header_block("ListModels"), _framed(b""), call)
        if call.failure.startswith("cannot connect"):
            raise Unavailable(f"{self._target.url}: {call.failure}")
        names = [model.id for data in messages for model in pb.ListModelsResponse.FromString(data).models]
        if call.failure or not names:
            raise ConfigError(f"{self._target.url}: lists no models ({call.failure or 'there are none'})")
        return names

    async def prepare(self, connections: int) -> None:
        """Opens the connections that so many calls would use.

        Raises:
            Unavailable: the server cannot be reached.
        """
        try:
            for _ in range(min(connections, self._target.connections)):
                await self._connection()
        except OSError as error:
            raise Unavailable(f"{self._target.url}: {_reason(error)}") from error

    def request(self, prompt: list[int] | str, max_tokens: int) -> bytes:
        """What to give to `send`: a message with its frame."""
        message = pb.GenerateRequest(model=self._target.model)
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.ids.extend(prompt)
        message.sampling.max_tokens = max_tokens
        message.sampling.temperature = self._target.temperature
        message.sampling.ignore_eos = self._target.ignore_eos
        return _framed(message.SerializeToString())

    async def send(self, request: bytes, answer: Answer) -> None:
        """Sends a request and fills the answer until it ends. Failures are written there, too."""
        answer.sent = time.perf_counter()
        call = _Call(lambda message, now: _read(answer, message, now))
        await self._send(self._generate, request, call)
        if call.failure:
            answer.fail(call.failure, time.perf_counter())
        elif math.isnan(answer.ended):
            answer.fail("the stream ended without a finished event", time.perf_counter())

    async def _send(self, header_block: bytes, request: bytes, call: _Call) -> None:
        try:
            async with asyncio.timeout(self._target.timeout):
                connection = await self._connection()
                await connection.call(header_block, request, call)
        except TimeoutError:
            call.failure = call.failure or f"timeout: no end after {self._target.timeout:g} s"
        except OSError as error:
            call.failure = f"cannot connect: {_reason(error)}"

    async def _connection(self) -> _Connection:
        """The next one in turn; a fresh one until there are as many as there may be."""
        async with self._opening:
            self._connections = [each for each in self._connections if not each.state.closed]
            if len(self._connections) < self._target.connections:
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, self._target.host, self._target.port, ssl=self._tls
                )
                self._connections.append(connection)
                return connection
        self._turn = (self._turn + 1) % len(self._connections)
        return self._connections[self._turn]

    async def close(self) -> None:
        """Closes every connection."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _header_block(self, method: str) -> bytes:
        return encode_headers(
            [
                (":method", "POST"),
                (":scheme", "http" if self._tls is None else "https"),
                (":path", _SERVICE + method),
                (":authority", self._target.authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *((name.lower(), value) for name, value in self._target.headers),
            ]
        )


class _Call:
    """One call's response: hands on whole messages, and says how it ended."""

    __slots__ = ("_on_message", "_rest", "_status", "done", "failure")

    def __init__(self, on_message: Callable[[bytes, float], None]) -> None:
        self._on_message = on_message
        self._rest = b""
        self._status = ""
        self.failure = ""
        self.done = asyncio.get_running_loop().create_future()

    def headers(self, headers: dict[str, str]) -> None:
        """See StreamReader."""
        if headers.get(":status", "200") != "200":
            self.failure = f"HTTP {headers[':status']}"
        status = headers.get("grpc-status")
        if status is None:
            return
        self._status = status
        if status != "0":
            name = Code(int(status)).name if status in _STATUSES else f"status {status}"
            self.failure = f"gRPC {name}: {unquote(headers.get('grpc-message', ''))}"

    def data(self, data: bytes, now: float) -> None:
        """See StreamReader."""
        if self._rest:
            data = self._rest + data
        elif len(data) == 5 + int.from_bytes(data[1:5]):
            self._on_message(data[5:], now)
            return
        at, size = 0, len(data)
        while size - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5])
            if end > size:
                break
            self._on_message(data[at + 5 : end], now)
            at = end
        self._rest = data[at:]

    def end(self, failure: str) -> None:
        """See StreamReader."""
        if not self.failure:
            self.failure = failure or ("" if self._status else "the stream ended without a status")
        if not self.done.done():
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """A connection with its calls."""

    def __init__(self) -> None:
        self.state = Http2Client()
        self._transport: Any = None

    async def call(self, header_block: bytes, request: bytes, call: _Call) -> None:
        """Makes a call; returns when it has ended."""
        number = self.state.request(header_block, request, call)
        self._write()
        try:
            await call.done
        finally:
            self.state.cancel(number)  # unless it has ended
            self._write()

    def close(self) -> None:
        """Closes it; calls under way end with a failure."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio.Protocol."""
        self._transport = transport
        self._write()

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        now = time.perf_counter()
        try:
            self.state.feed(data, now)
        except BadHttp2 as error:
            self.state.lost(f"bad HTTP/2: {error}")
            self._transport.abort()
            return
        self._write()
        if self.state.closed and not self.state.num_open:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        reason = _reason(error) if error else "closed by the server"
        self.state.lost(f"connection lost: {reason}")

    def _write(self) -> None:
        output = self.state.take_output()
        if output and not self._transport.is_closing():
            self._transport.write(output)


_STATUSES = {str(int(code)) for code in Code}


def _read(answer: Answer, message: bytes, now: float) -> None:
    """Takes an event of Generate that arrived at `now`."""
    event = pb.GenerateResponse.FromString(message)
    kind = event.WhichOneof("event")
    if kind == "delta":
        delta = event.delta
        if delta.token_ids or delta.text or delta.reasoning:
            answer.times.append(now)
    elif kind == "finished":
        usage = event.finished.usage
        answer.prompt_tokens = usage.prompt_tokens
        answer.cached_tokens = usage.cached_tokens
        answer.output_tokens = usage.completion_tokens
        answer.finish_reason = _REASONS.get(event.finished.finish_reason, "")
        answer.ended = now


def _framed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4) + message


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
