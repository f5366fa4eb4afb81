"""Content types and codings of requests' bodies, and that whoever sends what is refused gets to read why."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import aiohttp
import httpx
import pytest

from frontend.http import connection, content
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

BODY = json.dumps({"prompt": "p", "max_tokens": 4}).encode()
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
PATH = "/v1/completions"
LIMIT = 100_000
NO_COMPRESSION, RAW = 0, -zlib.MAX_WBITS


async def status_of(frontend: RunningFrontend, body: bytes = BODY, **headers: str) -> tuple[int, str, str]:
    """Status, message and Accept-Encoding of the answer to a body sent with these headers and no other."""
    async with aiohttp.ClientSession(frontend.url, skip_auto_headers=("Content-Type",)) as session:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with session.post(PATH, data=body, headers=named) as response:
            answer = await response.json()
            message = answer.get("error", {}).get("message", "")
            return response.status, message, response.headers.get("accept-encoding", "")


@pytest.fixture
async def small(start_frontend: FrontendFactory, scheduler: ScriptedScheduler) -> RunningFrontend:
    scheduler.reply = b"done"
    return await start_frontend(max_body_bytes=LIMIT)


@pytest.mark.parametrize(
    "content_type", [JSON, f"{JSON}; charset=utf-8", "Application/JSON", "application/vnd.x+json", FORM, None]
)
async def test_json_and_what_names_no_other_type_is_taken(small: RunningFrontend, content_type) -> None:
    headers = {} if content_type is None else {"content_type": content_type}
    assert await status_of(small, **headers) == (200, "", "")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "text/plain; application/json", "application/xml", "multipart/form-data"]
)
async def test_another_content_type_is_refused(small: RunningFrontend, content_type: str) -> None:
    status, message, _ = await status_of(small, content_type=content_type)
    assert status == 415
    assert f"{content_type.partition(';')[0]}; it must be application/json" in message


async def test_a_page_that_may_not_call_is_refused_what_browsers_send_without_asking(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"done"
    frontend = await start_frontend(allowed_origins=("https://page.example",))
    for headers in ({}, {"content_type": FORM}, {"content_type": "application/octet-stream"}):
        status, message, _ = await status_of(frontend, origin="https://other.example", **headers)
        assert status == 403
        assert "pages of https://other.example may not call" in message
        assert (await status_of(frontend, origin="https://page.example", **headers))[0] == 200
        assert (await status_of(frontend, **headers))[0] == 200, "no page at all"
    # JSON a browser sends only after it has asked.
    assert (await status_of(frontend, content_type=JSON, origin="https://other.example"))[0] == 200


async def test_an_unknown_path_is_said_to_be_unknown_whatever_is_sent_there(small: RunningFrontend) -> None:
    async with aiohttp.ClientSession(small.url) as session:
        async with session.post("/v1/nothing", data="text") as response:
            assert response.status == 404


def deflated(body: bytes, wbits: int) -> bytes:
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(body) + compressor.flush()


CODED = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "gzip by its old name": ("X-GZip", gzip.compress(BODY)),
    "gzip in two members": ("gzip", gzip.compress(BODY[:5]) + gzip.compress(BODY[5:])),
    "deflate": ("deflate", deflated(BODY, zlib.MAX_WBITS)),
    "deflate without a header": ("deflate", deflated(BODY, RAW)),
    "nothing": ("identity", BODY),
}


@pytest.mark.parametrize("case", CODED)
async def test_coded_bodies_are_decoded(small: RunningFrontend, case: str) -> None:
    coding, body = CODED[case]
    assert (await status_of(small, body, content_encoding=coding))[:2] == (200, "")


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
async def test_another_coding_is_refused_with_those_that_are_taken(small: RunningFrontend, coding) -> None:
    status, message, accepted = await status_of(small, content_encoding=coding)
    assert (status, accepted) == (415, "gzip, deflate")
    assert f"Content-Encoding is {coding}; gzip, deflate" in message


WRONGLY_CODED = {
    "no gzip": ("gzip", BODY, "incorrect header check"),
    "much that is no gzip": ("gzip", BODY * 3000, "incorrect header check"),
    "gzip cut off": ("gzip", gzip.compress(BODY)[:-9], "ends too early"),
    "gzip and more": ("gzip", gzip.compress(BODY) + b"more", "incorrect header check"),
    "very many members": ("gzip", gzip.compress(b"") * 1000, "something follows its end"),
    "wrong sum": ("gzip", gzip.compress(BODY)[:-8] + bytes(8), "incorrect data check"),
    "no deflate": ("deflate", b"\x07" + BODY, "invalid"),
    "deflate and more": ("deflate", deflated(BODY, RAW) + b"x", "something follows its end"),
}


@pytest.mark.parametrize("case", WRONGLY_CODED)
async def test_a_body_that_is_not_what_its_coding_says_is_a_400_and_one_line_of_the_log(
    small: RunningFrontend, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    caplog.set_level(logging.INFO)
    coding, body, part = WRONGLY_CODED[case]
    status, message, _ = await status_of(small, body, content_encoding=coding)
    assert status == 400
    assert f"is not the {coding} that its header says" in message
    assert part in message
    assert len(caplog.text.splitlines()) == 1, caplog.text


async def test_a_gzip_bomb_is_refused_and_not_inflated(
    small: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = gzip.compress(bytes(64_000_000), 1)[: LIMIT - 1]
    inflated = 0

    class Counting:
        def __init__(self, wbits: int) -> None:
            self._inner = zlib.decompressobj(wbits)

        def decompress(self, data: bytes, length: int) -> bytes:
            nonlocal inflated
            out = self._inner.decompress(data, length)
            inflated += len(out)
            return out

    counting = SimpleNamespace(decompressobj=Counting, error=zlib.error, MAX_WBITS=zlib.MAX_WBITS)
    monkeypatch.setattr(content, "zlib", counting)
    status, message, _ = await status_of(small, bomb, content_encoding="gzip")
    assert status == 413
    assert f"more than {LIMIT} bytes once it is decoded" in message
    assert inflated == LIMIT + 1


async def test_a_coded_body_that_is_too_large_itself_is_refused(small: RunningFrontend) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        member = gzip.compress(bytes(90_000), NO_COMPRESSION)
        for start in range(0, 4 * len(member), 4096):
            yield (4 * member)[start : start + 4096]

    async with aiohttp.ClientSession(small.url) as session:
        async with session.post(PATH, data=pieces(), headers={"Content-Encoding": "gzip"}) as response:
            assert response.status == 413


def pieces_of(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]


def urllib_status(url: str, body: bytes, headers: dict[str, str]) -> int:
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30)
    return raised.value.code


@pytest.mark.parametrize(
    ("body", "headers", "whole", "chunked"),
    [
        (bytes(40_000_000), {"Content-Type": JSON}, 413, 413),
        (bytes(40_000_000), {"Content-Type": "text/plain"}, 413, 415),
        (bytes(40_000_000), {"Content-Type": JSON, "Content-Encoding": "br"}, 413, 415),
        (gzip.compress(bytes(64_000_000), 1)[: LIMIT - 1], {"Content-Encoding": "gzip"}, 413, 413),
        (bytes(LIMIT - 1), {"Content-Encoding": "gzip"}, 400, 400),
    ],
    ids=["large", "large text", "large and coded", "bomb", "no gzip"],
)
async def test_every_client_gets_to_read_why_its_body_is_refused(
    small: RunningFrontend, body: bytes, headers: dict[str, str], whole: int, chunked: int
) -> None:
    """urllib and httpx read nothing before they have sent everything."""
    url = small.url + PATH
    assert await asyncio.to_thread(urllib_status, url, body, headers) == whole
    for sent, expected in ((body, whole), (pieces_of(body), chunked)):
        answer = await asyncio.to_thread(httpx.post, url, content=sent, headers=headers, timeout=30)
        assert answer.status_code == expected
    async with aiohttp.ClientSession() as session:
        async with session.post(url, data=body, headers=headers) as response:
            assert response.status == whole


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_sender_without_end_is_cut_off_after_a_bound(
    small: RunningFrontend, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    monkeypatch.setattr(connection, "_DISCARD_BYTES", 4_000_000)
    monkeypatch.setattr(connection, "_LINGER", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", small.http.port)
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 99999999999"
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(length + b"\r\n\r\n")
    status_line = asyncio.create_task(reader.readline())
    num_sent = 0

    async def send() -> None:
        nonlocal num_sent
        piece = bytes(1 << 16)
        while True:
            writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            await writer.drain()
            num_sent += len(piece)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send(), 10)
    assert num_sent < 40_000_000  # sockets' buffers included
    assert (await status_line).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_connection_serves_on_after_a_refused_body(small: RunningFrontend) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", small.http.port)
    for _ in range(2):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
        writer.write(bytes(300_000))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
        assert b"too_large" in await reader.readuntil(b"}}")
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
