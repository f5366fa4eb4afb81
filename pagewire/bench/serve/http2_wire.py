"""As much of HTTP/2 (RFC 9113) as a client of gRPC needs. No I/O.

Tokens arrive as one DATA frame each, so that frame's path is short. What the server may send is not limited:
windows are opened as far as they go, and the connection's is opened again long before it is used up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import hpack

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, ENABLE_PUSH = 4, 5, 2
CANCEL = 8
LARGEST_WINDOW = 2**31 - 1
DEFAULT_WINDOW, DEFAULT_FRAME = 65_535, 16_384
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_ERRORS = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)


class BadHttp2(Exception):
    """The server broke the protocol, or speaks another one."""


class StreamReader(Protocol):
    """What becomes of a stream's response."""

    def headers(self, headers: dict[str, str]) -> None:
        """The head, and at the end perhaps trailers."""

    def data(self, data: bytes, now: float) -> None:
        """More of the body."""

    def end(self, failure: str) -> None:
        """Nothing more comes; `failure` is "" if that is how it should be."""


@dataclass(slots=True)
class _Stream:
    reader: StreamReader
    window: int
    unsent: memoryview | None = None


@dataclass(slots=True)
class Http2Client:
    """The state of one connection. What `take_output` returns is to be written after every other call.

    Attributes:
        closed: why it takes no further requests; "" while it does.
    """

    closed: str = ""
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _blocked: dict[int, _Stream] = field(default_factory=dict)
    _output: list[bytes] = field(default_factory=list)
    _rest: bytes = b""
    _next_stream: int = 1
    _window: int = DEFAULT_WINDOW
    _stream_window: int = DEFAULT_WINDOW
    _frame_size: int = DEFAULT_FRAME
    _received: int = 0
    _decoder: hpack.Decoder = field(default_factory=hpack.Decoder)
    _block: tuple[int, int, bytes] = (0, 0, b"")

    def __post_init__(self) -> None:
        settings = struct.pack(">HIHI", ENABLE_PUSH, 0, INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        self._output += [PREFACE, _frame(SETTINGS, 0, 0, settings)]
        self._output.append(_window_update(0, LARGEST_WINDOW - DEFAULT_WINDOW))

    @property
    def num_open(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    def request(self, header_block: bytes, body: bytes, reader: StreamReader) -> int:
        """Sends a request; returns its stream's number. `header_block`: see encode_headers. Where the
        connection is closed its reader is told so at once."""
        if self.closed:
            reader.end(self.closed)
            return 0
        number = self._next_stream
        self._next_stream += 2
        stream = _Stream(reader, self._stream_window, memoryview(body))
        self._streams[number] = self._blocked[number] = stream
        self._output.append(_frame(HEADERS, END_HEADERS, number, header_block))
        self._send_bodies()
        return number

    def cancel(self, number: int) -> None:
        """Gives a stream up; its reader hears nothing more."""
        self._blocked.pop(number, None)
        if self._streams.pop(number, None) is not None:
            self._output.append(_frame(RST_STREAM, 0, number, struct.pack(">I", CANCEL)))

    def take_output(self) -> bytes:
        """What is to be sent."""
        if not self._output:
            return b""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def lost(self, reason: str) -> None:
        """The connection is gone: so is every stream. The first reason counts."""
        self.closed = self.closed or reason
        for number in list(self._streams):
            self._end(number, self.closed)

    def feed(self, data: bytes, now: float) -> None:
        """Takes what arrived.

        Raises:
            BadHttp2: it is no HTTP/2.
        """
        if self._rest:
            data = self._rest + data
        at, size = 0, len(data)
        while size - at >= 9:
            word, flags, number = _FRAME_HEAD.unpack_from(data, at)
            start = at + 9
            end = start + (word >> 8)
            if end - start > DEFAULT_FRAME:
                raise BadHttp2("the server does not speak HTTP/2" if at == 0 else "a frame is too large")
            if end > size:
                break
            at = end
            if word & 0xFF == DATA:
                self._data(number, flags, data[start:end], now)
            else:
                self._other(word & 0xFF, flags, number & LARGEST_WINDOW, data[start:end])
        self._rest = data[at:]

    def _data(self, number: int, flags: int, payload: bytes, now: float) -> None:
        self._received += len(payload)
        if self._received > LARGEST_WINDOW // 2:
            self._output.append(_window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:
            return  # given up
        if flags & PADDED:
            payload = _unpadded(payload)
        stream.reader.data(payload, now)
        if flags & END_STREAM:
            self._end(number, "")

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            if flags & PADDED:
                payload = _unpadded(payload)
            self._block = (number, flags, payload[5:] if flags & PRIORITY else payload)
        elif kind == CONTINUATION and number == self._block[0]:
            self._block = (number, self._block[1] | flags, self._block[2] + payload)
        if kind in (HEADERS, CONTINUATION):
            if flags & END_HEADERS:
                self._headers()
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self._output.append(_frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._opened(number, int.from_bytes(payload) & LARGEST_WINDOW)
        elif kind == RST_STREAM:
            self._end(number, f"the server reset the stream: {_error(payload)}")
        elif kind == GOAWAY:
            self._go_away(payload)

    def _headers(self) -> None:
        number, flags, block = self._block
        try:
            pairs = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise BadHttp2(f"headers cannot be decoded: {error}") from error
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.reader.headers({bytes(name).decode("latin-1"): _text(value) for name, value, *_ in pairs})
        if flags & END_STREAM:
            self._end(number, "")

    def _settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.window += value - self._stream_window
                self._stream_window = value
            elif name == MAX_FRAME_SIZE:
                self._frame_size = value
        self._output.append(_frame(SETTINGS, ACK, 0, b""))
        self._send_bodies()

    def _opened(self, number: int, more: int) -> None:
        if number == 0:
            self._window += more
        elif number in self._streams:
            self._streams[number].window += more
        self._send_bodies()

    def _go_away(self, payload: bytes) -> None:
        self.closed = f"the server takes no more requests: {_error(payload[4:8])}"
        last = int.from_bytes(payload[:4]) & LARGEST_WINDOW
        for number in [number for number in self._streams if number > last]:
            self._end(number, self.closed)

    def _send_bodies(self) -> None:
        """Sends what the server's windows allow of the bodies that it lacks, oldest first."""
        for number, stream in list(self._blocked.items()):
            while stream.unsent is not None:
                size = min(len(stream.unsent), self._frame_size, self._window, stream.window)
                is_last = size == len(stream.unsent)
                if size <= 0 and not is_last:
                    break
                part = stream.unsent[:size]
                self._output.append(_frame(DATA, END_STREAM if is_last else 0, number, bytes(part)))
                self._window -= size
                stream.window -= size
                stream.unsent = None if is_last else stream.unsent[size:]
            if stream.unsent is None:
                del self._blocked[number]
            elif self._window <= 0:
                return

    def _end(self, number: int, failure: str) -> None:
        self._blocked.pop(number, None)
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.reader.end(failure)


_FRAME_HEAD = struct.Struct(">IBI")


def encode_headers(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block that changes no state of the connection's compression, so that it serves many requests:
    every field as a literal without indexing (RFC 7541, 6.2.2)."""
    return b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in headers)


def _literal(text: str) -> bytes:
    data = text.encode("latin-1")
    return _length(len(data)) + data


def _length(value: int) -> bytes:
    """An integer with a prefix of seven bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes([value])
    rest = value - 127
    out = [127]
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes([*out, rest])


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def _window_update(stream: int, more: int) -> bytes:
    return _frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))


def _unpadded(payload: bytes) -> bytes:
    return payload[1 : len(payload) - payload[0]]


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else bytes(value).decode("latin-1")


def _error(payload: bytes) -> str:
    code = int.from_bytes(payload[:4])
    return _ERRORS[code] if code < len(_ERRORS) else str(code)
