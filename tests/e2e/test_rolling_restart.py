"""Frontends and the scheduler are replaced under load, and no request is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pagewire.base.errors import PagewireError
from pagewire.client import AsyncClient
from pagewire.wire.sampling_params import SamplingParams
from tools.service import Service

TOKENS = 20
# Between a client's requests. Without a pause they take both cores of a small machine from what is restarted.
PAUSE_SECONDS = 0.01
OPTIONS = ("--engine", "null", "--null-step-ms", "2", "--frontends", "2", "--max-connection-age", "1")


class Load:
    """Clients of every kind that ask again and again, and what became of their requests."""

    def __init__(self, service: Service) -> None:
        self.outcomes: Counter[str] = Counter()
        self._service = service
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        loops = [
            self._grpc,
            self._grpc,
            self._grpc_anew,
            self._http,
            self._http,
            self._http_anew,
            self._http_anew,
        ]
        self._tasks = [asyncio.create_task(loop()) for loop in loops]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _grpc(self) -> None:
        async with AsyncClient(self._service.grpc_target, max_retries=0) as client:
            while not self._stopping:
                await self._ask_grpc(client)

    async def _grpc_anew(self) -> None:
        while not self._stopping:
            async with AsyncClient(self._service.grpc_target, max_retries=0) as client:
                await self._ask_grpc(client)

    async def _ask_grpc(self, client: AsyncClient) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        try:
            answer = await client.generate(token_ids=[300, 301, 302], sampling_params=sampling)
            self.outcomes["grpc ok" if len(answer.token_ids) == TOKENS else "grpc short"] += 1
        except PagewireError as error:
            self.outcomes[f"grpc {type(error).__name__}: {error}"] += 1

    async def _http(self) -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            while not self._stopping:
                await self._ask_http(client, "kept")

    async def _http_anew(self) -> None:
        while not self._stopping:
            async with httpx.AsyncClient(timeout=30) as client:
                await self._ask_http(client, "anew")

    async def _ask_http(self, client: httpx.AsyncClient, kind: str) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        body = {
            "model": self._service.model,
            "prompt": [300, 301, 302],
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }
        try:
            response = await client.post(f"{self._service.http_url}/v1/completions", json=body)
            response.raise_for_status()
            whole = response.json()["usage"]["completion_tokens"] == TOKENS
            self.outcomes[f"http {kind} ok" if whole else f"http {kind} short"] += 1
        except httpx.HTTPError as error:
            self.outcomes[f"http {kind} {type(error).__name__}: {error}"] += 1

    @property
    def lost(self) -> dict[str, int]:
        """Requests that ended in any other way than they should, by what clients saw."""
        return {outcome: count for outcome, count in self.outcomes.items() if not outcome.endswith(" ok")}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    runtime = tempfile.mkdtemp(dir="/tmp")  # a short path: it holds Unix sockets
    directory = tmp_path_factory.mktemp("rolling")
    with Service(directory, options=OPTIONS, environment={"XDG_RUNTIME_DIR": runtime}) as service:
        service.runtime = Path(runtime)  # type: ignore[attr-defined]
        yield service
    Path(runtime).rmdir()


def children(service: Service, word: str) -> list[psutil.Process]:
    supervisor = psutil.Process(service.process.pid)
    return [child for child in supervisor.children() if word in child.cmdline()[:5]]


async def replaced(service: Service, before: list[psutil.Process]) -> None:
    """Waits until none of these processes is left, and as many others have taken their place."""
    async with asyncio.timeout(60):
        while any(child.is_running() for child in before) or len(children(service, "frontend")) < len(before):
            await asyncio.sleep(0.1)


async def test_frontends_are_replaced_one_after_another_and_no_request_is_lost(service: Service) -> None:
    before = children(service, "frontend")
    assert len(before) == 2
    async with Load(service) as load:
        await asyncio.sleep(0.5)
        service.process.send_signal(signal.SIGHUP)
        await replaced(service, before)
        await asyncio.sleep(0.5)
    assert load.lost == {}, load.outcomes
    assert len(load.outcomes) == 3, "every kind of client was served"
    assert service.process.poll() is None


async def test_the_scheduler_is_replaced_and_no_request_is_lost(service: Service) -> None:
    [before] = children(service, "scheduler")
    async with Load(service) as load:
        await asyncio.sleep(0.3)
        before.terminate()
        await asyncio.to_thread(before.wait)
        await asyncio.sleep(2)
    assert load.lost == {}, load.outcomes


def test_drain_takes_the_whole_service_out(service: Service) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(service.runtime)}  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "pagewire", "drain", "--timeout", "5"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "drained"), ended
    for _ in range(8):  # whichever of the frontends it reaches
        assert httpx.get(f"{service.http_url}/ready").status_code == 503
