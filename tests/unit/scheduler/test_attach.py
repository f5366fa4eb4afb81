"""How a scheduler waits for its worker."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.dispatch.control import WorkerEndpoint, rank_socket
from scheduler.workers.attach import attach
from scheduler.workers.watchdog import FIRST_STEPS_FACTOR
from tests.unit.scheduler.test_service import FACTS, WorkerThread


def nothing(path: Path) -> None:
    """No worker was ever there."""


def stale(path: Path) -> None:
    """A worker was killed and left its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize("before", [nothing, stale])
async def test_a_worker_that_comes_is_attached_soon_and_waiting_for_it_costs_nothing(
    tmp_path: Path, before: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "worker.sock"
    before(path)
    with caplog.at_level(logging.WARNING):
        attaching = asyncio.create_task(attach(path))
        await asyncio.sleep(0.1)
        seconds = time.process_time()
        await asyncio.sleep(0.4)
        assert time.process_time() - seconds < 0.1
        assert not attaching.done()
        worker = WorkerThread(path)
        link = await asyncio.wait_for(attaching, 5)
    assert link.facts == FACTS
    assert not caplog.records, "a worker that is not there yet is no fault"
    link.close()
    worker.close()


async def test_what_is_no_worker_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, caplog.at_level(logging.WARNING):
        other.bind(str(path))
        other.listen()
        attaching = asyncio.create_task(attach(path))
        async with asyncio.timeout(5):
            while not caplog.records:
                await asyncio.sleep(0.01)
        attaching.cancel()
    assert str(path) in caplog.text


LISTENS_AND_SLEEPS = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen(8)
print("listening", flush=True)
time.sleep(60)
"""


async def test_a_worker_that_answers_no_scheduler_is_killed_and_the_next_one_attached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that hung while its scheduler died: no step is in flight for a watchdog to look at."""
    path = tmp_path / "worker.sock"
    hung = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENS_AND_SLEEPS, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert hung.stdout is not None
    await hung.stdout.readline()
    attaching = asyncio.create_task(attach(path, step_timeout=0.3 / FIRST_STEPS_FACTOR))
    # It has no handler that writes its stacks, so the request for them is its end.
    assert await asyncio.wait_for(hung.wait(), 10) in (-signal.SIGUSR1, -signal.SIGKILL)
    assert f"pid {hung.pid}) hangs" in caplog.text
    worker = WorkerThread(path)
    link = await asyncio.wait_for(attaching, 10)
    assert link.facts == FACTS
    link.close()
    worker.close()


async def test_a_worker_that_is_busy_for_a_while_is_not_killed(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    hung = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENS_AND_SLEEPS, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert hung.stdout is not None
    await hung.stdout.readline()
    attaching = asyncio.create_task(attach(path, step_timeout=5.0 / FIRST_STEPS_FACTOR))
    await asyncio.sleep(0.5)
    assert hung.returncode is None
    attaching.cancel()
    hung.kill()
    await hung.wait()


async def test_a_worker_that_was_warm_has_less_time(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    hung = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENS_AND_SLEEPS, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert hung.stdout is not None
    await hung.stdout.readline()
    (tmp_path / "worker.sock.warm").touch()
    began = time.monotonic()
    attaching = asyncio.create_task(attach(path, step_timeout=1.0))
    await asyncio.wait_for(hung.wait(), 10)
    # Two steps may have been in flight.
    assert 2.0 <= time.monotonic() - began < FIRST_STEPS_FACTOR
    attaching.cancel()


async def test_a_rank_that_is_missing_is_waited_for_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "worker.sock"
    facts = [replace(FACTS, rank=rank, world_size=2) for rank in range(2)]
    first = WorkerEndpoint(path)
    stale(rank_socket(path, 1))

    def serve(endpoint: WorkerEndpoint, rank: int) -> None:
        endpoint.accept(facts[rank], lambda rendezvous: None)

    threading.Thread(target=serve, args=(first, 0), daemon=True).start()
    with caplog.at_level(logging.INFO):
        attaching = asyncio.create_task(attach(path))
        await asyncio.sleep(0.4)
        assert not attaching.done()
        second = WorkerEndpoint(rank_socket(path, 1))
        threading.Thread(target=serve, args=(second, 1), daemon=True).start()
        link = await asyncio.wait_for(attaching, 5)
    assert [rank.facts for rank in link.ranks] == facts
    assert not caplog.records
    link.close()
    first.close()
    second.close()
