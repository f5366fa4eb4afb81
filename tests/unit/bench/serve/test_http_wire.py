"""Responses and events are read the same however the network cuts them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.serve.http_wire import BadResponse, EventSplitter, ResponseDecoder

BODIES = st.binary(max_size=300)
CUTS = st.lists(st.integers(min_value=0, max_value=2000), max_size=12)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, some of which may be empty."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def chunked(parts: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = [b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts if part]
    return b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"


def decoded(decoder: ResponseDecoder, pieces: list[bytes]) -> bytes:
    return b"".join(decoder.feed(piece) for piece in pieces if piece)


@given(
    parts=st.lists(BODIES, max_size=6),
    places=CUTS,
    extension=st.sampled_from([b"", b";name=value"]),
    trailer=st.sampled_from([b"", b"x-sum: 1\r\n"]),
    interim=st.booleans(),
)
def test_a_chunked_body(
    parts: list[bytes], places: list[int], extension: bytes, trailer: bytes, interim: bool
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = b"HTTP/1.1 100 Continue\r\n\r\n" * interim + head
    data += chunked(parts, extension=extension, trailer=trailer)
    decoder = ResponseDecoder()
    assert decoded(decoder, cut(data, places)) == b"".join(parts)
    assert (decoder.status, decoder.is_complete, decoder.keeps_alive) == (200, True, True)
    assert decoder.headers["content-type"] == "text/event-stream"


@given(body=BODIES, places=CUTS)
def test_a_sized_body(body: bytes, places: list[int]) -> None:
    data = (
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\nconnection: Close\r\n\r\n" % len(body)
        + body
    )
    decoder = ResponseDecoder()
    assert decoded(decoder, cut(data, places)) == body
    assert (decoder.status, decoder.is_complete, decoder.keeps_alive) == (429, True, False)


@given(body=BODIES, places=CUTS)
def test_a_body_that_ends_with_the_connection(body: bytes, places: list[int]) -> None:
    decoder = ResponseDecoder()
    assert decoded(decoder, cut(b"HTTP/1.0 200 OK\r\n\r\n" + body, places)) == body
    assert not decoder.is_complete
    decoder.end()
    assert decoder.is_complete
    assert not decoder.keeps_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-2\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nmore",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000,
    ],
)
def test_what_is_malformed_is_refused(data: bytes) -> None:
    with pytest.raises(BadResponse):
        ResponseDecoder().feed(data)


def test_a_connection_that_closes_too_early_is_an_error() -> None:
    decoder = ResponseDecoder()
    decoder.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab")
    with pytest.raises(BadResponse, match="in the middle"):
        decoder.end()


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20).map(str.encode)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=6)


@given(
    events=EVENTS,
    places=CUTS,
    newline=st.sampled_from([b"\n", b"\r\n"]),
    between=st.sampled_from([b"", b": keep-alive", b"event: message", b"id: 7"]),
    space=st.booleans(),
)
def test_events_of_any_form(
    events: list[list[bytes]], places: list[int], newline: bytes, between: bytes, space: bool
) -> None:
    field = b"data: " if space else b"data:"
    stream = b""
    for lines in events:
        stream += (between + newline) * bool(between)
        stream += b"".join(field + line + newline for line in lines) + newline
    splitter = EventSplitter()
    found = [event for piece in cut(stream, places) for event in splitter.feed(piece)]
    if not space:  # then a first space belongs to the field
        events = [[line.removeprefix(b" ") for line in lines] for lines in events]
    assert found == [b"\n".join(lines) for lines in events]


def test_several_events_in_one_piece_are_several() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b'data: {"a": 1}\n\ndata: {"b": 2}\n\n') == [b'{"a": 1}', b'{"b": 2}']
    assert splitter.feed(b"data: x\n\n: ping\n\ndata: y\n\n") == [b"x", b"y"]
    assert splitter.feed(b"data: half") == []
    assert splitter.feed(b"\n\n") == [b"half"]
