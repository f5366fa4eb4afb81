"""HTTP/2 as far as calls need it: frames cut anywhere, windows, endings."""

from __future__ import annotations

import struct

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.serve import http2_wire as wire
from pagewire.bench.serve.http2_wire import BadHttp2, Http2Client, encode_headers
from tests.unit.bench.serve.test_http_wire import CUTS, cut


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        word, flags, stream = struct.unpack_from(">IBI", data)
        end = 9 + (word >> 8)
        found.append((word & 255, flags, stream, data[9:end]))
        data = data[end:]
    return found


class Reader:
    def __init__(self) -> None:
        self.head: list[dict[str, str]] = []
        self.body = b""
        self.ended: list[str] = []

    def headers(self, headers: dict[str, str]) -> None:
        self.head.append(headers)

    def data(self, data: bytes, now: float) -> None:
        self.body += data

    def end(self, failure: str) -> None:
        self.ended.append(failure)


def opened(body: bytes = b"") -> tuple[Http2Client, Reader, int]:
    client, reader = Http2Client(), Reader()
    assert client.take_output().startswith(wire.PREFACE)
    return client, reader, client.request(encode_headers([(":method", "POST")]), body, reader)


def sent_body(client: Http2Client) -> bytes:
    return b"".join(payload for kind, *_, payload in frames(client.take_output()) if kind == wire.DATA)


HEAD = hpack.Encoder().encode([(":status", "200"), ("content-type", "application/grpc")])


@given(body=st.lists(st.binary(max_size=60), max_size=6), places=CUTS, padding=st.integers(0, 9))
def test_a_response_cut_anywhere(body: list[bytes], places: list[int], padding: int) -> None:
    client, reader, number = opened()
    encoder = hpack.Encoder()
    head = encoder.encode([(":status", "200"), ("x", "y" * 40)])
    trailers = encoder.encode([("grpc-status", "0"), ("grpc-message", "")])
    data = frame(wire.SETTINGS, 0, 0, struct.pack(">HI", wire.MAX_FRAME_SIZE, 20_000))
    data += frame(wire.HEADERS, 0, number, head[:5]) + frame(
        wire.CONTINUATION, wire.END_HEADERS, number, head[5:]
    )
    for part in body:
        data += frame(wire.PING, 0, 0, b"12345678")
        padded = bytes([padding]) + part + bytes(padding)
        data += (
            frame(wire.DATA, wire.PADDED, number, padded) if padding else frame(wire.DATA, 0, number, part)
        )
    data += frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, number, trailers)
    client.take_output()
    for piece in cut(data, places):
        client.feed(piece, 0.0)
    assert reader.head == [
        {":status": "200", "x": "y" * 40},
        {"grpc-status": "0", "grpc-message": ""},
    ]
    assert (reader.body, reader.ended) == (b"".join(body), [""])
    answers = frames(client.take_output())
    assert answers.count((wire.SETTINGS, wire.ACK, 0, b"")) == 1
    assert answers.count((wire.PING, wire.ACK, 0, b"12345678")) == len(body)
    assert client.num_open == 0


@given(
    st.lists(st.tuples(st.text("abc-", min_size=1), st.text(st.characters(max_codepoint=255), max_size=300)))
)
def test_header_blocks_decode_to_what_was_encoded(headers: list[tuple[str, str]]) -> None:
    decoder = hpack.Decoder(max_header_list_size=10**6)
    block = encode_headers(headers)
    for _ in range(2):  # it changes nothing for the next
        decoded = [
            (bytes(name).decode(), bytes(value).decode("latin-1"))
            for name, value in decoder.decode(block, raw=True)
        ]
        assert decoded == headers


def test_a_name_that_equals_its_value_is_still_a_header() -> None:
    assert hpack.Decoder().decode(encode_headers([("te", "te")])) == [("te", "te")]


def test_a_body_goes_out_as_the_windows_open() -> None:
    body = bytes(range(256)) * 400
    client, _, number = opened(body)
    first = sent_body(client)
    assert first == body[: wire.DEFAULT_WINDOW]
    client.feed(frame(wire.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1_000_000)), 0.0)
    assert sent_body(client) == b""  # the stream's own window is still shut
    client.feed(frame(wire.WINDOW_UPDATE, 0, number, struct.pack(">I", 10_000)), 0.0)
    second = sent_body(client)
    assert len(second) == 10_000
    client.feed(frame(wire.SETTINGS, 0, 0, struct.pack(">HI", wire.INITIAL_WINDOW_SIZE, 1_000_000)), 0.0)
    assert first + second + sent_body(client) == body


def test_later_requests_wait_their_turn_for_the_connections_window() -> None:
    client, _, _ = opened(b"a" * wire.DEFAULT_WINDOW)
    client.request(b"", b"b" * 10, Reader())
    assert sent_body(client) == b"a" * wire.DEFAULT_WINDOW
    client.feed(frame(wire.WINDOW_UPDATE, 0, 0, struct.pack(">I", 10)), 0.0)
    assert sent_body(client) == b"b" * 10


def test_the_servers_window_is_opened_again_before_it_is_used_up() -> None:
    client, reader, number = opened()
    client._received = wire.LARGEST_WINDOW // 2
    client.take_output()
    client.feed(frame(wire.DATA, 0, number, b"x"), 0.0)
    [(kind, _, stream, payload)] = frames(client.take_output())
    assert (kind, stream) == (wire.WINDOW_UPDATE, 0)
    assert int.from_bytes(payload) == wire.LARGEST_WINDOW // 2 + 1
    assert reader.body == b"x"


def test_streams_end_as_the_server_says() -> None:
    client, reset, number = opened()
    refused, lost = Reader(), Reader()
    client.request(b"", b"", lost)
    client.request(b"", b"", refused)
    client.feed(frame(wire.RST_STREAM, 0, number, struct.pack(">I", 7)), 0.0)
    assert reset.ended == ["the server reset the stream: REFUSED_STREAM"]
    client.feed(frame(wire.GOAWAY, 0, 0, struct.pack(">II", number + 2, 11)), 0.0)
    assert refused.ended == ["the server takes no more requests: ENHANCE_YOUR_CALM"]
    client.take_output()
    late = Reader()
    client.request(b"", b"", late)
    assert late.ended == refused.ended
    assert client.take_output() == b""
    assert lost.ended == []  # it was taken before
    client.lost("connection lost")
    assert lost.ended == refused.ended


def test_a_connection_that_is_lost_says_why_to_whoever_comes_later() -> None:
    client, reader, _ = opened()
    client.lost("bad HTTP/2")
    client.lost("closed by the server")
    late = Reader()
    client.request(b"", b"", late)
    assert reader.ended == late.ended == ["bad HTTP/2"]


def test_a_cancelled_stream_hears_nothing_more() -> None:
    client, reader, number = opened(b"x" * 100_000)
    client.take_output()
    client.cancel(number)
    assert frames(client.take_output()) == [(wire.RST_STREAM, 0, number, struct.pack(">I", wire.CANCEL))]
    client.feed(
        frame(wire.HEADERS, wire.END_HEADERS, number, HEAD) + frame(wire.DATA, 1, number, b"late"), 0.0
    )
    assert (reader.head, reader.body, reader.ended) == ([], b"", [])


def test_another_protocol_is_refused() -> None:
    client, _, _ = opened()
    with pytest.raises(BadHttp2, match="does not speak HTTP/2"):
        client.feed(b"HTTP/1.1 400 Bad Request\r\n\r\n", 0.0)
