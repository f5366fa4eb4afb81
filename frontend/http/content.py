"""In which content types and codings a request's body is taken, and how it is read (RFC 9110, section 8)."""

from __future__ import annotations

import zlib

from aiohttp import web

from frontend.http.cors import CorsPolicy
from frontend.http.failure import Failure
from pagewire.base.errors import InvalidRequest

_CODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}

_MAX_MEMBERS = 64
"""Streams that a gzip body may consist of; each costs a copy of what follows it."""

_UNNAMED = frozenset(("", "application/octet-stream", "application/x-www-form-urlencoded"))
"""What clients say of a body when nobody told them what it is: curl the last, some libraries the second. A
browser sends the first and the last to another origin without asking, so that any page could."""


class ContentRefused(Exception):
    """A body of this type or coding is not taken.

    Attributes:
        failure: why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def check_content_type(request: web.Request, cors: CorsPolicy) -> None:
    """Takes JSON, and what may be JSON unless it is a page of a strange origin that sends it.

    Raises:
        ContentRefused: it is of another type, or of none and from a page that may not call this server.
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type == "application/json" or content_type.endswith("+json"):
        return
    if content_type not in _UNNAMED:
        message = f"the body's Content-Type is {content_type}; it must be application/json"
        raise ContentRefused(Failure(status=415, message=message, code="unsupported_media_type"))
    origin = request.headers.get("Origin")
    if origin is not None and not cors.allows(origin):
        message = (
            f"pages of {origin} may not call this server (--allowed-origins), and the body's Content-Type is "
            "not application/json"
        )
        raise ContentRefused(Failure(status=403, message=message, code="cors"))


async def read_content(request: web.Request, limit: int) -> None:
    """Reads the body and undoes its coding. The request keeps it: `request.read()` is it from then on.

    Args:
        limit: the most bytes that it may have, as it came and decoded. No more are decoded.

    Raises:
        ContentRefused: the coding is not taken.
        InvalidRequest: the body is not what the coding says.
        HTTPRequestEntityTooLarge: it is too large.
    """
    word = request.headers.get("Content-Encoding", "").strip().lower()
    if word in ("", "identity"):
        await request.read()
        return
    if word not in _CODINGS:
        taken = "gzip, deflate"
        message = f"the body's Content-Encoding is {word}; {taken} and none are taken"
        raise ContentRefused(
            Failure(status=415, message=message, code="unsupported_media_type", accept_encoding=taken)
        )
    decoder = _Decoder(_CODINGS[word], limit)
    num_encoded = 0
    while data := await request.content.readany():
        num_encoded += len(data)
        if num_encoded > limit:
            raise too_large(f"the request body has more than {limit} bytes", limit, num_encoded)
        decoder.feed(data)
    request._read_bytes = decoder.whole()


def too_large(message: str, limit: int, size: int) -> web.HTTPRequestEntityTooLarge:
    """The refusal of a body."""
    return web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size, text=message)


class _Decoder:
    """Undoes gzip or deflate, no further than to `limit` bytes.

    aiohttp does this too, but bounds it by the request only since 3.14, and logs a traceback for every body
    that it cannot decode.
    """

    def __init__(self, coding: str, limit: int) -> None:
        self._coding = coding
        self._limit = limit
        self._decoded = bytearray()
        self._stream: zlib._Decompress | None = None
        self._num_members = 0

    def feed(self, data: bytes) -> None:
        """Decodes the next bytes.

        Raises: see `read_content`.
        """
        while data:
            stream = self._stream or self._next_stream(data[0])
            room = self._limit - len(self._decoded)
            try:
                self._decoded += stream.decompress(data, room + 1)
            except zlib.error as error:
                raise self._wrong(str(error)) from None
            if len(self._decoded) > self._limit:
                message = f"the request body has more than {self._limit} bytes once it is decoded"
                raise too_large(message, self._limit, len(self._decoded))
            data = stream.unused_data
            if stream.eof:
                self._stream = None

    def whole(self) -> bytes:
        """The body, all of which has been fed.

        Raises: see `read_content`.
        """
        if self._stream is not None or not self._num_members:
            raise self._wrong("it ends too early")
        return bytes(self._decoded)

    def _next_stream(self, first: int) -> zlib._Decompress:
        """The decoder of a stream that begins with the byte `first`."""
        self._num_members += 1
        if self._num_members > (_MAX_MEMBERS if self._coding == "gzip" else 1):
            raise self._wrong("something follows its end")
        if self._coding == "gzip":
            wbits = 16 + zlib.MAX_WBITS
        else:
            # "deflate" means deflate within zlib's format; some clients send it bare, without zlib's header.
            wbits = zlib.MAX_WBITS if first & 0x0F == 8 else -zlib.MAX_WBITS
        self._stream = zlib.decompressobj(wbits)
        return self._stream

    def _wrong(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"the request body is not the {self._coding} that its header says: {reason}")
