"""How a scheduler waits for its worker."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.attach import attach
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
