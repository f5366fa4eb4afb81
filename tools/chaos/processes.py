"""The processes of a service, by their names in its log."""

from __future__ import annotations

import re
from collections import Counter

import psutil

from tools.service import Service

ROLES = ("engine-worker", "scheduler", "frontend")
_STARTED = re.compile(r"^(\S+)\s+\| starting, pid (\d+)$", re.MULTILINE)
_DIED = re.compile(r"^(\S+)\s+\| (.*); restarting (?:now|in .* s)$", re.MULTILINE)
KILLED = "was killed by SIGKILL"


def role_of(name: str) -> str:
    """Of a process: all frontends have one, and all ranks."""
    return next((role for role in ROLES if name.startswith(role)), name)


def replica_of(name: str) -> str:
    """The number of the replica that a scheduler or a worker belongs to; empty where there is only one, and
    for frontends."""
    number = name.removeprefix(role_of(name)).removeprefix("-").partition("-")[0]
    return "" if name.startswith("frontend") else number


def living(service: Service) -> dict[str, psutil.Process]:
    """The service's processes that run now, by name; not the supervisor."""
    children = {child.pid: child for child in psutil.Process(service.process.pid).children()}
    return {name: children[pid] for name, pid in started(service) if pid in children and runs(children[pid])}


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; it may at any moment."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started(service: Service) -> list[tuple[str, int]]:
    """Name and id of every process that the supervisor has ever started, in order."""
    return [(name, int(pid)) for name, pid in _STARTED.findall(service.log)]


def deaths(service: Service) -> Counter[tuple[str, str]]:
    """How often processes of each role have died unasked, and how."""
    return Counter((role_of(name), how) for name, how in _DIED.findall(service.log))
