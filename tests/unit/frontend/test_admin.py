"""Draining and leaving, as an operator and a supervisor ask for it."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import aiohttp
import grpc
import pytest

from pagewire.admin.v1 import admin_pb2, admin_pb2_grpc
from pagewire.base.errors import Unavailable
from pagewire.cli.main import app
from pagewire.client import AsyncClient
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.unit.frontend.conftest import FrontendFactory
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler


async def test_drain_refuses_new_requests_tells_of_open_ones_and_ends_when_there_are_none(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    socket = tmp_path / "admin.sock"
    frontend = await start_frontend(admin_socket=socket)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    async with (
        AsyncClient(frontend.target, max_retries=0) as client,
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        assert await stub.GetStatus(admin_pb2.GetStatusRequest()) == admin_pb2.GetStatusResponse(ready=True)
        asking = asyncio.ensure_future(client.generate("abc"))
        submit = await scheduler.submitted()
        call = stub.Drain(admin_pb2.DrainRequest(timeout=20))
        messages = aiter(call)
        assert (await anext(messages)).num_open_requests == 1
        status = await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert status == admin_pb2.GetStatusResponse(draining=True, num_open_requests=1)
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("new")
        async with aiohttp.ClientSession() as session, session.get(f"{frontend.url}/ready") as response:
            assert response.status == 503
        await scheduler.say(submit.handle, b"done", end=pb.Ended(reason=pb.END_REASON_LENGTH))
        *_, last = [progress async for progress in messages]
        assert last == admin_pb2.DrainResponse(drained=True)
        assert (await asking).text == "done"


async def test_requests_that_outlast_the_drain_are_ended_and_counted(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    socket = tmp_path / "admin.sock"
    frontend = await start_frontend(admin_socket=socket)
    async with (
        AsyncClient(frontend.target, max_retries=0) as client,
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        asking = asyncio.ensure_future(client.generate("abc"))
        await scheduler.submitted()
        *_, last = [progress async for progress in stub.Drain(admin_pb2.DrainRequest(timeout=0.05))]
        assert last == admin_pb2.DrainResponse(drained=True, num_aborted=1)
        await asyncio.wait([asking])
        with pytest.raises(grpc.aio.AioRpcError, match="a number from 0 on"):
            await stub.Drain(admin_pb2.DrainRequest(timeout=-1)).read()


async def test_the_public_port_knows_no_admin_service(
    start_frontend: FrontendFactory, tmp_path: Path
) -> None:
    frontend = await start_frontend(admin_socket=tmp_path / "admin.sock")
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetStatus(admin_pb2.GetStatusRequest())
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_that_leaves_takes_no_connection_and_serves_those_it_has(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"done"
    frontend = await start_frontend(max_connection_age=2.0)
    body = {"model": "bytes", "prompt": "abc"}
    async with aiohttp.ClientSession() as session, AsyncClient(frontend.target, max_retries=0) as client:
        async with session.post(f"{frontend.url}/v1/completions", json=body) as response:
            assert response.headers.get("connection") != "close"
            await response.read()
        await client.generate("abc")
        leaving = asyncio.ensure_future(frontend.leave())
        await asyncio.sleep(0.1)
        async with session.post(f"{frontend.url}/v1/completions", json=body) as response:
            assert (response.status, response.headers["connection"]) == (200, "close")
        assert (await client.generate("abc")).text == "done"
        for port in (frontend.http.port, frontend.grpc.port):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        await leaving
        with pytest.raises(Unavailable):
            await client.generate("abc")


def test_drain_without_a_frontend_says_what_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["drain"])
    assert "names the --admin-socket" in str(result.exception)
