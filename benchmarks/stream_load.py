"""A client that costs little, so that it is not what is measured: reads streams and counts what comes.

Raw protocols on uvloop: HTTP/1.1 with server-sent events or a JSON body, and gRPC by HTTP/2 frames of its
own. Nothing is parsed but the lengths that are needed to count. `python -m benchmarks.stream_load` is a
process of its own, told what to do by its arguments. Each line on its stdin lets it go on to its next report,
a JSON object: that it began, once every stream has got something, and then what came since.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from pagewire.inference.v1 import inference_pb2 as pb

KINDS = ("sse", "http", "grpc", "grpc-once")
PROMPT = "The capital of France is Paris, and the capital of Italy is"
STREAMS_PER_CONNECTION = 32  # of HTTP/2
CONNECTING = 64  # connections being opened at once
WINDOW = 2**31 - 1
WINDOW_STEP = 1 << 20
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4


@dataclass
class Load:
    """What all connections together do and have seen.

    Attributes:
        max_tokens: of each request.
        again: whether a stream whose answer is complete asks again.
        streams: how many there are to be.
        begun: streams that have got something.
        messages, num_bytes, answers: what came.
    """

    max_tokens: int
    again: bool
    streams: int
    begun: int = 0
    messages: int = 0
    num_bytes: int = 0
    answers: int = 0
    all_begun: asyncio.Event = field(default_factory=asyncio.Event)

    def note_begun(self) -> None:
        self.begun += 1
        if self.begun == self.streams:
            self.all_begun.set()

    def counts(self) -> dict[str, Any]:
        return {"messages": self.messages, "bytes": self.num_bytes, "answers": self.answers}


class HttpStream(asyncio.Protocol):
    """One connection of HTTP/1.1 that asks /v1/completions."""

    def __init__(self, load: Load, *, stream: bool) -> None:
        body = {"prompt": PROMPT, "max_tokens": load.max_tokens, "stream": stream}
        data = json.dumps(body).encode()
        self._request = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        self._load = load
        self._stream = stream
        self._begun = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        load = self._load
        load.num_bytes += len(data)
        if not self._begun:
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"refused: {data[:500]!r}")
            self._begun = True
            load.note_begun()
        if self._stream:
            load.messages += data.count(b"\ndata: {")
            # A chunked body ends with an empty chunk.
            ended = data.endswith(b"\r\n0\r\n\r\n") or (self._tail + data).endswith(b"\r\n0\r\n\r\n")
        else:
            ended = data.endswith(b"}}}")
            load.messages += ended
        self._tail = data[-8:]
        if ended:
            load.answers += 1
            if load.again:
                self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            raise SystemExit(f"connection lost: {error}")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(path: str) -> bytes:
    """A gRPC call's header fields, literal and without an index (RFC 7541, section 6.2.2)."""

    def text(value: str) -> bytes:
        return bytes((len(value),)) + value.encode()

    return (
        b"\x83\x86"  # :method POST, :scheme http
        + b"\x04" + text(path)
        + b"\x01" + text("localhost")
        + b"\x0f\x10" + text("application/grpc")
        + b"\x00" + text("te") + text("trailers")
    )  # fmt: skip


class GrpcStreams(asyncio.Protocol):
    """One connection of HTTP/2 with some gRPC calls."""

    def __init__(self, load: Load, num_streams: int, *, stream: bool) -> None:
        sampling = pb.SamplingParams(max_tokens=load.max_tokens)
        message = pb.GenerateRequest(text=PROMPT, sampling=sampling).SerializeToString()
        self._body = b"\0" + len(message).to_bytes(4, "big") + message
        name = "Generate" if stream else "GenerateOnce"
        self._headers = header_block(f"/pagewire.inference.v1.InferenceService/{name}")
        self._load = load
        self._num_streams = num_streams
        self._next_stream = 1
        self._open: dict[int, int] = {}
        """Of each stream: bytes of its message that are still to come; -1 before the first."""
        self._buffer = b""
        self._unacknowledged = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        window = b"\x00\x04" + WINDOW.to_bytes(4, "big")  # SETTINGS_INITIAL_WINDOW_SIZE
        self._transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0, window)
            + frame(WINDOW_UPDATE, 0, 0, (WINDOW - 65535).to_bytes(4, "big"))
        )
        for _ in range(self._num_streams):
            self._ask()

    def _ask(self) -> None:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._open[stream] = -1
        self._transport.write(
            frame(HEADERS, END_HEADERS, stream, self._headers) + frame(DATA, END_STREAM, stream, self._body)
        )

    def data_received(self, data: bytes) -> None:
        self._load.num_bytes += len(data)
        self._unacknowledged += len(data)
        if self._unacknowledged >= WINDOW_STEP:
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, self._unacknowledged.to_bytes(4, "big")))
            self._unacknowledged = 0
        if self._buffer:
            data = self._buffer + data
        at, size = 0, len(data)
        while size - at >= 9:
            end = at + 9 + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
            if end > size:
                break
            kind = data[at + 3]
            if kind == DATA:
                self._take(int.from_bytes(data[at + 5 : at + 9], "big"), data, at + 9, end)
            else:
                self._control(
                    kind, data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : end]
                )
            at = end
        self._buffer = data[at:]

    def _take(self, stream: int, data: bytes, at: int, end: int) -> None:
        """Counts the messages that begin in a frame, which come with their length (gRPC over HTTP/2)."""
        left = self._open[stream]
        if left < 0:
            left = 0
            self._load.note_begun()
        while at < end:
            if left == 0:
                self._load.messages += 1
                left = 5 + int.from_bytes(data[at + 1 : at + 5], "big")  # the server never splits these five
            taken = min(left, end - at)
            left -= taken
            at += taken
        self._open[stream] = left

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._transport.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind in (RST_STREAM, GOAWAY):
            raise SystemExit(f"the server ended stream {stream}: {payload!r}")
        elif kind == HEADERS and flags & END_STREAM:
            if self._open.pop(stream) < 0:
                raise SystemExit(f"a call was refused: {payload!r}")
            self._load.answers += 1
            if self._load.again:
                self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            raise SystemExit(f"connection lost: {error}")


async def connect_all(load: Load, kind: str, host: str, port: int) -> list[asyncio.BaseTransport]:
    """Opens every connection; each asks at once."""
    stream = kind in ("sse", "grpc")
    makers: list[Callable[[], asyncio.Protocol]] = []
    if kind in ("sse", "http"):
        makers = [lambda: HttpStream(load, stream=stream)] * load.streams
    else:
        for begin in range(0, load.streams, STREAMS_PER_CONNECTION):
            number = min(STREAMS_PER_CONNECTION, load.streams - begin)
            makers.append(lambda number=number: GrpcStreams(load, number, stream=stream))  # type: ignore[misc]
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(CONNECTING)

    async def connect(make: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        async with slots:
            return (await loop.create_connection(make, host, port))[0]

    return list(await asyncio.gather(*map(connect, makers)))


def tell(**values: Any) -> None:
    """One line to the parent."""
    print(json.dumps(values), flush=True)


async def run(arguments: argparse.Namespace) -> None:
    """Streams until the parent wants to know what came."""
    load = Load(arguments.max_tokens, arguments.again, arguments.streams)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    transports = await connect_all(load, arguments.kind, arguments.host, arguments.port)
    await load.all_begun.wait()
    await loop.run_in_executor(None, sys.stdin.readline)
    before, began, cpu = load.counts(), time.perf_counter(), time.process_time()
    tell(began=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    came = {name: value - before[name] for name, value in load.counts().items()}
    tell(done=True, seconds=seconds, cpu_seconds=cpu, **came)
    load.again = False
    for transport in transports:
        transport.close()


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if error is not None:
        print(f"stream_load: {error!r}", file=sys.stderr, flush=True)
        loop.stop()


def main() -> None:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=100_000)
    parser.add_argument("--again", action="store_true", help="ask again when an answer is complete")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
