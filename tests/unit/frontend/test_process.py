"""The frontend as a process of its own: start, idleness, sharing a port, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from pagewire.base.errors import PagewireError, Unavailable
from pagewire.client import AsyncClient
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, stop

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from frontend.config import FrontendConfig
from frontend.server import run
model, scheduler, port, grpc_port = sys.argv[1:]
config = FrontendConfig(
    model=model, scheduler=scheduler, served_model_names=("bytes",), host="127.0.0.1",
    port=int(port), grpc_port=int(grpc_port), drain_timeout=5,
)
sys.exit(run(config))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A started frontend and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, grpc_port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.target = f"127.0.0.1:{grpc_port}"

    async def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 10)


@pytest.fixture
def started(scheduler: ScriptedScheduler, model_dir: Path, tmp_path: Path) -> Callable[..., object]:
    """Starts a frontend process and waits until it has said that it is ready."""

    @asynccontextmanager
    async def start(ports: tuple[int, int] | None = None) -> AsyncIterator[Process]:
        port, grpc_port = ports or (free_port(), free_port())
        address = str(tmp_path / f"notify-{port}-{len(list(tmp_path.iterdir()))}.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.bind(address)
            notifications.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, str(model_dir), scheduler.target, str(port), str(grpc_port)),
                cwd=ROOT,
                env={**os.environ, "NOTIFY_SOCKET": address, "PYTHONPATH": str(ROOT)},
            )
            try:
                loop = asyncio.get_running_loop()
                message = await asyncio.wait_for(loop.sock_recv(notifications, 1000), 20)
                assert message.startswith(b"READY=1\n")
                yield Process(process, port, grpc_port)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    return start


async def until_served(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        for _ in range(100):
            async with session.get("/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)
    raise AssertionError("not ready within 5 s")


async def test_sigterm_finishes_open_streams_refuses_new_ones_and_exits_with_0(started, scheduler) -> None:
    async with started() as frontend, AsyncClient(frontend.target, max_retries=0) as client:
        await until_served(frontend.url)
        stream = client.generate("p", stream=True)
        first = asyncio.ensure_future(anext(stream))
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, b"a")
        assert (await first).text == "a"

        exited = asyncio.ensure_future(frontend.terminate())
        async with aiohttp.ClientSession(frontend.url) as session:
            while True:
                async with session.get("/ready") as response:
                    if response.status == 503:
                        break
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("late")
        assert not exited.done()
        await scheduler.say(submit.handle, [*b"b", EOS], end=stop(EOS))
        assert "".join([delta.text async for delta in stream]) == "b"
        assert await exited == 0


async def test_idle_frontend_uses_no_cpu(started) -> None:
    async with started() as frontend:
        await until_served(frontend.url)
        process = psutil.Process(frontend.process.pid)
        await asyncio.sleep(0.5)
        before = process.cpu_times()
        await asyncio.sleep(2)
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        assert used <= 0.02, f"{used:.3f} s of CPU in 2 s"
        assert await frontend.terminate() == 0


async def test_killed_frontend_leaves_the_streams_of_the_other_alone(started, scheduler) -> None:
    ports = free_port(), free_port()
    async with started(ports) as one, started(ports) as other:
        await until_served(one.url)
        await scheduler.until(lambda scheduler: scheduler.num_streams == 2)
        scheduler.reply = b"0123456789"
        scheduler.pause_between_tokens = 0.02
        outcomes = await asyncio.gather(
            *(whole_or_error(one.target) for _ in range(12)), kill_soon(other.process)
        )
        texts = [outcome for outcome in outcomes if outcome is not None]
        assert set(texts) == {"0123456789", "lost"}
        assert await one.terminate() == 0


async def whole_or_error(target: str) -> str:
    """One generation over a connection of its own."""
    async with AsyncClient(target, max_retries=0) as client:
        try:
            return (await client.generate("p")).text
        except PagewireError:
            return "lost"


async def kill_soon(process: asyncio.subprocess.Process) -> None:
    await asyncio.sleep(0.1)
    process.kill()
