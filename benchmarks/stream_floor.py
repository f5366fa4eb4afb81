"""Servers that do nothing but write: what the libraries and the system take for each message of a stream.

`python -m benchmarks.stream_floor sse|grpc` prints its port, and on every tick writes one prepared message,
as large as a token's, to every open stream. SSE is written to uvloop's transports as they are; gRPC with
grpc.aio, by a task for each call, which is the only way it has.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import grpc
import uvloop

TICK_SECONDS = 0.04
FRAME = b"e6\r\ndata: {" + b"x" * 223 + b"\r\n"
MESSAGE = b"x" * 62
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class EventStreams:
    """Raw HTTP: every connection is a stream from its first byte on."""

    def __init__(self) -> None:
        self._transports: list[asyncio.Transport] = []

    async def start(self) -> int:
        """The port."""
        transports = self._transports

        class Stream(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self._transport = cast(asyncio.Transport, transport)

            def data_received(self, data: bytes) -> None:
                self._transport.write(HEAD + FRAME)
                transports.append(self._transport)

        server = await asyncio.get_running_loop().create_server(Stream, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    def tick(self) -> None:
        """Writes to all."""
        for transport in self._transports:
            if not transport.is_closing():
                transport.write(FRAME)


class Calls(grpc.GenericRpcHandler):
    """gRPC: every call is a stream."""

    def __init__(self) -> None:
        self._ticks: list[asyncio.Event] = []

    def service(self, details: object) -> Any:
        """The one handler there is."""
        return grpc.unary_stream_rpc_method_handler(self._stream)

    async def _stream(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        tick = asyncio.Event()
        self._ticks.append(tick)
        await context.write(MESSAGE)
        while True:
            await tick.wait()
            tick.clear()
            await context.write(MESSAGE)

    async def start(self) -> int:
        """The port."""
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    def tick(self) -> None:
        """Writes to all."""
        for tick in self._ticks:
            tick.set()


async def run(kind: str) -> None:
    """Ticks until the parent ends it."""
    server = EventStreams() if kind == "sse" else Calls()
    print(await server.start(), flush=True)
    while True:
        await asyncio.sleep(TICK_SECONDS)
        server.tick()


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1]))
