"""Keys, origins, slow and broken clients, and the id that every answer and log line carries."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import aiohttp
import grpc
import pytest

from frontend.api_keys import ApiKeys
from frontend.config import FrontendConfig
from pagewire.base.errors import ConfigError, Unavailable
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc
from pagewire.scheduler.v1 import scheduler_pb2
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

PAGE = "https://page.example"


async def raw(frontend: RunningFrontend, *pieces: bytes, pause: float = 0.0) -> tuple[str, dict, dict]:
    """Sends bytes over a connection of its own; status line, headers and JSON body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.http.port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(pause)
    head, _, body = (await asyncio.wait_for(reader.read(), 15)).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return status, headers, json.loads(body)


async def test_keys_come_from_options_and_from_a_file(
    start_frontend: FrontendFactory, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# people\nfirst\n\n  second  \n")
    frontend = await start_frontend(api_keys=("third",), api_key_file=keys)
    async with aiohttp.ClientSession(frontend.url) as session:
        for key, expected in (("first", 200), ("second", 200), ("third", 200), ("# people", 401), ("", 401)):
            async with session.get("/v1/models", headers={"authorization": f"Bearer {key}"}) as response:
                assert response.status == expected, key


@pytest.mark.parametrize(
    ("content", "part"), [("", "has no key"), ("# none\n", "has no key"), ("a b\n", "line 1 has white space")]
)
def test_a_key_file_that_would_let_everyone_or_nobody_in_is_refused(tmp_path: Path, content, part) -> None:
    keys = tmp_path / "keys"
    keys.write_text(content)
    with pytest.raises(ConfigError, match=part):
        ApiKeys.load((), keys)


async def test_any_page_may_call_by_default(frontend: RunningFrontend) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    headers = "authorization, content-type"
    async with aiohttp.ClientSession(frontend.url) as session:
        path = "/v1/chat/completions"
        async with session.options(
            path, headers={**asked, "Access-Control-Request-Headers": headers}
        ) as response:
            assert response.status == 204
            assert response.headers["access-control-allow-origin"] == "*"
            assert response.headers["access-control-allow-headers"] == headers
            assert "POST" in response.headers["access-control-allow-methods"]
        async with session.post(path, json={}, headers={"Origin": PAGE}) as response:
            assert response.status == 400
            assert response.headers["access-control-allow-origin"] == "*"
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        async with session.get("/v1/models") as response:
            assert "access-control-allow-origin" not in response.headers


async def test_only_allowed_pages_methods_and_headers_pass_a_preflight(start_frontend) -> None:
    frontend = await start_frontend(
        allowed_origins=(PAGE,),
        allowed_methods=("get", "POST"),
        allowed_headers=("Authorization",),
        allow_credentials=True,
        api_keys=("key",),
    )

    async def preflight(session, origin=PAGE, method="POST", headers=""):
        asked = {"Origin": origin, "Access-Control-Request-Method": method}
        if headers:
            asked["Access-Control-Request-Headers"] = headers
        async with session.options("/v1/models", headers=asked) as response:
            return response.status, response.headers

    async with aiohttp.ClientSession(frontend.url) as session:
        status, headers = await preflight(session, headers="authorization")
        assert (status, headers["access-control-allow-origin"]) == (204, PAGE)
        assert headers["access-control-allow-credentials"] == "true"
        assert headers["vary"] == "Origin"
        status, headers = await preflight(session, origin="https://other.example")
        assert (status, headers.get("access-control-allow-origin")) == (403, None)
        assert headers["vary"] == "Origin"
        assert (await preflight(session, method="DELETE"))[0] == 403
        assert (await preflight(session, headers="authorization, x-other"))[0] == 403


def test_cors_settings_that_mean_nothing_are_refused() -> None:
    def config(**settings: object) -> FrontendConfig:
        return FrontendConfig(model="m", scheduler="s", **settings)

    for wrong in ('["*"]', "example.org", "https://a.example,https://b.example", "https://a.example/path"):
        with pytest.raises(ConfigError, match="allowed_origins"):
            config(allowed_origins=(wrong,))
    with pytest.raises(ConfigError, match="allow_credentials"):
        config(allow_credentials=True)
    config(allowed_origins=("http://localhost:3000", "http://[::1]:80", "chrome-extension://abc", "null"))


async def test_a_body_that_does_not_arrive_in_time_is_cut_off(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(request_timeout=0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    status, headers, body = await raw(frontend, head, *[b" "] * 4, pause=0.1)
    assert status.startswith("HTTP/1.1 408")
    assert body["error"]["code"] == "request_timeout"
    assert headers["x-request-id"]
    assert headers["connection"] == "close"


async def test_headers_that_do_not_arrive_in_time_are_cut_off(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(request_timeout=0.2)
    status, headers, body = await raw(frontend, b"GET /hea", b"lth HTTP/1.1\r\n", b"Host:", pause=0.05)
    assert status.startswith("HTTP/1.1 408")
    assert "headers did not arrive within 0.2 s" in body["error"]["message"]
    assert headers["x-request-id"]


async def test_a_quiet_connection_and_a_long_answer_are_not_cut_off(start_frontend, scheduler) -> None:
    frontend = await start_frontend(request_timeout=0.1)
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(session.post("/v1/completions", json={"prompt": "p"}))
        submit = await scheduler.submitted()
        await asyncio.sleep(0.3)
        await scheduler.say(
            submit.handle, b"a", end=scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_LENGTH)
        )
        assert (await asking).status == 200
        await asyncio.sleep(0.3)
        async with session.get("/health") as response:
            assert response.status == 200


async def ended_within(seconds: float, reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.read(), seconds)
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


async def test_clients_that_send_nothing_or_a_byte_at_a_time_disturb_nobody_and_are_cut_off(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"done"
    frontend = await start_frontend(request_timeout=2.0)
    silent = [
        await asyncio.open_connection("127.0.0.1", port)
        for port in (frontend.http.port, frontend.grpc.port)
        for _ in range(50)
    ]
    slow = [await asyncio.open_connection("127.0.0.1", frontend.http.port) for _ in range(200)]

    async def trickle() -> None:
        for byte in b"GET /health HTTP/1.1":
            for _, writer in slow:
                writer.write(bytes([byte]))
            await asyncio.sleep(0.1)

    trickling = asyncio.create_task(trickle())
    async with aiohttp.ClientSession(frontend.url) as session:
        for _ in range(10):
            body = {"prompt": "p", "max_tokens": 4}
            async with session.post("/v1/completions", json=body) as response:
                assert (await response.json())["choices"][0]["text"] == "done"
    assert not any(reader.at_eof() for reader, _ in slow), "the others were served while these were open"
    assert all(await asyncio.gather(*(ended_within(10, reader) for reader, _ in (*slow, *silent))))
    trickling.cancel()
    for _, writer in (*slow, *silent):
        writer.close()


async def test_an_idle_connection_is_closed_in_the_end(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(idle_timeout=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.http.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert await ended_within(5, reader)
    writer.close()


async def test_connections_beyond_the_limit_are_refused_until_others_end(
    start_frontend: FrontendFactory,
) -> None:
    frontend = await start_frontend(max_connections=3)
    held = [await asyncio.open_connection("127.0.0.1", frontend.http.port) for _ in range(3)]
    await asyncio.sleep(0.1)
    status, headers, body = await raw(frontend, b"")
    assert status == "HTTP/1.1 503 Service Unavailable"
    assert (headers["retry-after"], body["error"]["code"]) == ("1", "too_many_connections")
    held[0][1].close()
    await asyncio.sleep(0.1)
    status, *_ = await raw(frontend, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    for _, writer in held:
        writer.close()


async def test_grpc_connections_beyond_the_limit_are_refused(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(max_connections=3)
    clients = [AsyncClient(frontend.target, max_retries=0) for _ in range(3)]
    for client in clients:
        await client.models()
    async with AsyncClient(frontend.target, max_retries=0) as refused:
        with pytest.raises(Unavailable):
            await refused.models()
    for client in clients:
        assert await client.models()
        await client.close()


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/9.9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nExpect: a miracle\r\nConnection: close\r\n\r\n",
]


async def test_what_is_no_http_is_answered_in_openais_shape(frontend: RunningFrontend) -> None:
    for request_bytes in MALFORMED:
        status, headers, body = await raw(frontend, request_bytes)
        assert status.split()[1] in ("400", "417"), request_bytes
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "invalid_request_error"
        assert headers["x-request-id"]
        assert headers["content-type"].startswith("application/json")


@pytest.fixture
async def stub(frontend: RunningFrontend):
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def test_request_id_is_in_every_grpc_answer(stub, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    named = inference_pb2.GenerateRequest(text="p", request_id="mine")
    for request, metadata, expected in (
        (named, (("x-request-id", "theirs"),), "mine"),
        (inference_pb2.GenerateRequest(text="p"), (("x-request-id", "theirs"),), "theirs"),
    ):
        for call in (
            stub.GenerateOnce(request, metadata=metadata),
            stub.Generate(request, metadata=metadata),
        ):
            if hasattr(call, "read"):
                assert (await call.read()).request_id == expected
                while await call.read() is not grpc.aio.EOF:
                    pass
            else:
                assert (await call).request_id == expected
            assert ("x-request-id", expected) in [*await call.trailing_metadata()]
    refused = stub.GenerateOnce(inference_pb2.GenerateRequest(text="", request_id="wrong"))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await refused
    assert ("x-request-id", "wrong") in [*raised.value.trailing_metadata()]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=(("x-request-id", "y" * 200),))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [len(value) for key, value in raised.value.trailing_metadata() if key == "x-request-id"] == [32]


async def test_every_request_is_a_log_line_with_its_id_and_without_secrets(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, caplog
) -> None:
    scheduler.reply = b"x"
    caplog.set_level(logging.INFO)
    frontend = await start_frontend(api_keys=("sesame",))
    headers = {"authorization": "Bearer sesame", "x-request-id": "web-1"}
    async with aiohttp.ClientSession(frontend.url, headers=headers) as session:
        for path in ("/v1/completions?key=sesame", "/v1/nothing%0Aforged", "/health"):
            await session.post(path, json={"prompt": "private words"})
        await session.post("/v1/completions", json={"prompt": "p"}, headers={"authorization": "Bearer wrong"})
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(text="private words", request_id="rpc-1")
        await stub.GenerateOnce(request, metadata=(("x-api-key", "sesame"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GenerateOnce(request, metadata=(("x-api-key", "wrong"),))
    lines = [record.getMessage() for record in caplog.records if record.name == "frontend.access"]
    ends = [line.rpartition(" in ")[0].split(" ", 3) for line in lines]
    assert [
        (head[1], head[3].partition(" ")[2] if head[3].startswith("[") else head[3]) for head in ends
    ] == [
        ("web-1:", "POST /v1/completions -> 200"),
        ("web-1:", "POST /v1/nothing\\nforged -> 404"),
        ("web-1:", "POST /v1/completions -> 401"),
        ("rpc-1:", "/pagewire.inference.v1.InferenceService/GenerateOnce -> OK"),
        (ends[4][1], "/pagewire.inference.v1.InferenceService/GenerateOnce -> UNAUTHENTICATED"),
    ]
    assert not any(secret in caplog.text for secret in ("sesame", "private words", "wrong"))


async def test_an_abandoned_request_is_logged_as_closed_by_its_client(frontend, scheduler, caplog) -> None:
    caplog.set_level(logging.INFO)
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(
            session.post("/v1/completions", json={"prompt": "p", "request_id": "mine"})
        )
        submit = await scheduler.submitted()
        asking.cancel()
        await scheduler.aborted(submit.handle)
    assert any("request mine:" in message and "-> client closed" in message for message in caplog.messages)


async def test_no_access_log_if_it_is_turned_off(start_frontend, caplog) -> None:
    caplog.set_level(logging.INFO)
    frontend = await start_frontend(access_log=False)
    async with aiohttp.ClientSession(frontend.url) as session:
        await session.get("/v1/models")
    assert not [record for record in caplog.records if record.name == "frontend.access"]


async def test_requests_are_logged_without_what_clients_wrote_unless_asked(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, caplog
) -> None:
    scheduler.reply = b"x"
    caplog.set_level(logging.INFO)
    body = {"prompt": "private words", "stop": ["secret stop"], "temperature": 0.5, "request_id": "mine"}
    for settings, expected in (
        ({}, None),
        (
            {"enable_log_requests": True},
            "request mine: prompt of 13 tokens, temperature=0.5, max_tokens=16, stop=...",
        ),
        (
            {"enable_log_requests": True, "max_log_len": 7},
            "request mine: prompt of 13 tokens, temperature=0.5, max_tokens=16, stop=('secre..., "
            "prompt='private'...",
        ),
    ):
        caplog.clear()
        frontend = await start_frontend(**settings)
        async with aiohttp.ClientSession(frontend.url) as session:
            async with session.post("/v1/completions", json=body) as response:
                assert response.status == 200
        lines = [record.getMessage() for record in caplog.records if record.name == "frontend.requests"]
        assert lines == ([] if expected is None else [expected])


async def test_prompts_longer_than_the_operator_allows_are_refused(start_frontend, scheduler) -> None:
    scheduler.reply = b"x"
    frontend = await start_frontend(max_prompt_tokens=5)
    async with aiohttp.ClientSession(frontend.url) as session:
        for prompt, expected in (("12345", 200), ("123456", 400), ([1] * 6, 400), (["1", "123456"], 400)):
            async with session.post("/v1/completions", json={"prompt": prompt}) as response:
                answer = await response.json()
                assert response.status == expected, answer
                if expected == 400:
                    assert "this server takes at most 5" in answer["error"]["message"]
