"""HTTP/1.1 responses and server-sent events, from bytes that may be cut anywhere. No I/O.

What a server that streams tokens sends most is one small chunk with one event; that path is short.
"""

from __future__ import annotations

MAX_HEAD = 64 * 1024
_HEAD, _CHUNKED, _SIZED, _UNTIL_CLOSE, _COMPLETE = range(5)


class BadResponse(Exception):
    """What arrived is not HTTP/1.1 as this client reads it."""


class ResponseDecoder:
    """Reads one response; make another for the next on the same connection.

    Attributes:
        status: 0 until the head is there.
        headers: by name in lower case; of several with one name, the last.
    """

    __slots__ = ("_left", "_rest", "_state", "headers", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._state = _HEAD
        self._rest = b""
        self._left = 0  # bytes still to come: of a sized body, or of a chunk with the two that end it

    @property
    def is_complete(self) -> bool:
        """Whether the response is there to its end."""
        return self._state == _COMPLETE

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can carry another request after this response."""
        return self.is_complete and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """Takes what arrived; returns what it holds of the body.

        Raises:
            BadResponse: it is malformed.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if self._state == _CHUNKED:
            return (not self._left and _one_chunk(data)) or self._chunks(data)
        if self._state == _HEAD:
            return self._head(data)
        if self._state == _SIZED:
            return self._sized(data)
        if self._state == _COMPLETE and data:
            raise BadResponse(f"{len(data)} bytes after the end of the response")
        return data

    def end(self) -> None:
        """The connection was closed.

        Raises:
            BadResponse: the response was not at its end.
        """
        if self._state == _UNTIL_CLOSE:
            self._state = _COMPLETE
            self.headers["connection"] = "close"
        elif self._state != _COMPLETE:
            raise BadResponse("the connection was closed in the middle of the answer")

    def _head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise BadResponse(f"headers of more than {MAX_HEAD} bytes")
            self._rest = data
            return b""
        lines = data[:end].decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise BadResponse(f"no HTTP/1.1 status line: {lines[0][:80]!r}")
        body = data[end + 4 :]
        if status.startswith("1"):
            return self.feed(body)  # an interim response; the real one follows
        self.status = int(status[:3])
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._state = self._kind_of_body()
        return self.feed(body)

    def _kind_of_body(self) -> int:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            return _CHUNKED
        length = self.headers.get("content-length")
        if length is None:
            return _COMPLETE if self.status in (204, 304) else _UNTIL_CLOSE
        if not length.isdecimal():
            raise BadResponse(f"content-length is {length[:40]!r}")
        self._left = int(length)
        return _SIZED if self._left else _COMPLETE

    def _sized(self, data: bytes) -> bytes:
        if len(data) > self._left:
            raise BadResponse(f"{len(data) - self._left} bytes after the end of the response")
        self._left -= len(data)
        if not self._left:
            self._state = _COMPLETE
        return data

    def _chunks(self, data: bytes) -> bytes:
        pieces = []
        at, size = 0, len(data)
        while at < size:
            if self._left:
                piece = data[at : at + max(0, self._left - 2)]
                taken = min(self._left, size - at)
                self._left -= taken
                at += taken
                if piece:
                    pieces.append(piece)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                break
            length = _chunk_size(data[at:end])
            if not length:
                self._trailers(data[at:])
                break
            at = end + 2
            self._left = length + 2
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _trailers(self, data: bytes) -> None:
        """After the last chunk's size: lines of trailers, which nobody needs, and an empty one."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise BadResponse(f"trailers of more than {MAX_HEAD} bytes")
            self._rest = data
            return
        if len(data) > end + 4:
            raise BadResponse(f"{len(data) - end - 4} bytes after the end of the response")
        self._state = _COMPLETE


def _one_chunk(data: bytes) -> bytes:
    """The content of data that is just one chunk; b"" if it is anything else."""
    end = data.find(b"\r\n", 1, 10)
    digits = data[:end]
    if end > 0 and digits.isalnum():
        try:
            if len(data) == end + 4 + int(digits, 16) and data[-2:] == b"\r\n":
                return data[end + 2 : -2]
        except ValueError:
            return b""
    return b""


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        size = int(digits, 16)
    except ValueError:
        size = -1
    if size < 0 or digits[:1] in b"+-":
        raise BadResponse(f"a chunk's size is {line[:40]!r}")
    return size


class EventSplitter:
    """Splits a stream of server-sent events into their data. Lines end with LF or CRLF, as servers do it."""

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of every event that is whole now, in order. Events without data are left out."""
        is_one = body.find(b"\n") == len(body) - 2 and body[-1:] == b"\n" and body[-3:-2] != b"\r"
        if is_one and body[:6] == b"data: " and not self._rest and not self._data:
            return [body[6:-2]]
        return self._lines(body)

    def _lines(self, body: bytes) -> list[bytes]:
        events: list[bytes] = []
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
