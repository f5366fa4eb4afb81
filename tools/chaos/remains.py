"""What a service holds at rest, and what it leaves behind."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.segments import segments_of
from tools.chaos.processes import living, runs, started
from tools.service import Service

REST_SECONDS = 60.0
# Threads of pools that come and go hold a descriptor or two.
FEW_DESCRIPTORS = 4
_AT_REST = ("num_requests_running", "num_requests_waiting", "num_steps_in_flight", "kv_cache_used_blocks")
_WORKER_SOCKET = re.compile(r"(\S*)/worker(?:-\d+)?\.sock")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the service holds when nobody asks anything of it.

    Attributes:
        descriptors: open ones of each process by name, the supervisor's too.
        mapped_segments: shared memory that a process maps, by the process's name; most has lost its own name.
        sockets: names of files in the runtime directory.
        descendants: how many processes there are below the supervisor.
        busy: what was not at rest, by metric; empty if everything was.
    """

    descriptors: dict[str, int]
    mapped_segments: dict[str, int]
    sockets: tuple[str, ...]
    descendants: int
    busy: dict[str, float] = field(default_factory=dict)


async def at_rest(service: Service, num_processes: int) -> Holdings:
    """Waits until all processes run and nothing is being done, and looks."""
    busy = await _until_idle(service, num_processes)
    await asyncio.sleep(1.0)  # connections that were closed are taken notice of
    supervisor = psutil.Process(service.process.pid)
    processes = {"supervisor": supervisor, **living(service)}
    return Holdings(
        descriptors={name: process.num_fds() for name, process in processes.items()},
        mapped_segments={name: _mapped_segments(process) for name, process in processes.items()},
        sockets=tuple(
            sorted(path.name for path in runtime_directory(processes.values()).iterdir() if path.is_socket())
        ),
        descendants=len(supervisor.children(recursive=True)),
        busy=busy,
    )


async def _until_idle(service: Service, num_processes: int) -> dict[str, float]:
    deadline = time.monotonic() + REST_SECONDS
    busy: dict[str, float] = {}
    while time.monotonic() < deadline:
        try:
            ready = await asyncio.to_thread(httpx.get, f"{service.http_url}/ready", timeout=5)
            metrics = await asyncio.to_thread(service.metrics) if ready.status_code == 200 else {}
        except httpx.HTTPError:
            metrics = {}
        busy = {name: _added_up(metrics, f"pagewire:{name}") for name in _AT_REST}
        if not any(busy.values()) and len(living(service)) == num_processes:
            return {}
        await asyncio.sleep(0.1)
    return {name: value for name, value in busy.items() if value}


def _added_up(metrics: dict[str, float], name: str) -> float:
    """A metric of all replicas; NaN where none tells it."""
    found = [value for key, value in metrics.items() if key.partition("{")[0] == name]
    return sum(found) if found else float("nan")


def runtime_directory(processes: Iterable[psutil.Process]) -> Path:
    """Where the service's Unix sockets are, as the command lines of its processes say."""
    for process in processes:
        found = _WORKER_SOCKET.search(" ".join(process.cmdline()))
        if found is not None:
            return Path(found[1].rpartition("=")[2])
    raise RuntimeError("no process was given the worker's socket")


def _mapped_segments(process: psutil.Process) -> int:
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return len({line.split(maxsplit=5)[5] for line in maps.splitlines() if "/pagewire-" in line})


class Descendants:
    """Every process that was ever seen below the supervisor, also those that processes started themselves."""

    def __init__(self, service: Service) -> None:
        self._supervisor = psutil.Process(service.process.pid)
        self._seen: set[psutil.Process] = set()

    async def watch(self, seconds: float) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(seconds)

    def look(self) -> None:
        """Notes those that run now."""
        self._seen.update(self._supervisor.children(recursive=True))

    def orphans(self) -> list[str]:
        """Those that still run, and are no longer below the supervisor."""
        mine = set(self._supervisor.children(recursive=True)) if self._supervisor.is_running() else set()
        return [_said(process) for process in self._seen - mine if runs(process)]


def _said(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()[:6])}"
    except psutil.NoSuchProcess:
        return str(process.pid)


def left_behind(before: Holdings, after: Holdings) -> dict[str, list[str]]:
    """What is held at the end and was not at the beginning, by kind."""
    return {
        "blocks": [f"{name} is {value:g}" for name, value in after.busy.items()],
        "descriptors": [
            f"{name}: {before.descriptors.get(name)} became {count}"
            for name, count in after.descriptors.items()
            if count > before.descriptors.get(name, 0) + FEW_DESCRIPTORS
        ],
        "segments": [
            f"{name} maps {count} instead of {before.mapped_segments.get(name)}"
            for name, count in after.mapped_segments.items()
            if count != before.mapped_segments.get(name)
        ],
        "sockets": sorted(set(after.sockets) ^ set(before.sockets)),
        "processes": []
        if after.descendants == before.descendants
        else [f"{before.descendants} below the supervisor became {after.descendants}"],
    }


def named_segments(service: Service) -> list[str]:
    """Segments in /dev/shm of any process that the service has started."""
    return segments_of(pid for _, pid in started(service))
