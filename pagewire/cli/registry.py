"""What runs on this machine. Each service writes itself down in its runtime directory; others read it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.supervisor import Report

FILE_NAME = "service.json"
PREFIX = "pagewire-"

STARTING, READY, RESTARTING, STOPPING = "starting", "ready", "restarting", "stopping"


@dataclass(slots=True)
class ProcessRecord:
    """A process of a service.

    Attributes:
        pid: of its last start.
        state: "starting", "ready", "restarting" or "stopping".
        restarts: how often it died and was started again.
    """

    pid: int
    state: str = STARTING
    restarts: int = 0


@dataclass(slots=True, kw_only=True)
class ServiceRecord:
    """A running service.

    Attributes:
        pid: of the process that supervises the others.
        started_ticks: when that started, in clock ticks since boot (proc(5)): process ids are used again, but
            not together with this.
        pid_namespace: in which `pid` is meant; the directory may be shared with containers.
        directory: where its sockets and this file lie.
        model: the name that requests use.
        http, grpc: where it answers.
        started_at: Unix seconds.
        processes: by name.
    """

    pid: int
    started_ticks: int
    pid_namespace: str
    directory: str
    model: str
    version: str
    http: str
    grpc: str
    started_at: float
    processes: dict[str, ProcessRecord] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, **facts: Any) -> ServiceRecord:
        """A record of a service that this process supervises."""
        pid = os.getpid()
        return cls(
            pid=pid,
            started_ticks=_started_ticks(pid) or 0,
            pid_namespace=_pid_namespace(),
            started_at=time.time(),
            **facts,
        )

    @property
    def state(self) -> str:
        """The state of the whole: ready if every process is."""
        states = [process.state for process in self.processes.values()]
        return next((each for each in (STOPPING, RESTARTING, STARTING) if each in states), READY)


class RecordingReport:
    """Keeps a service's file up to date, and passes on to another report what happens.

    Implements pagewire.supervisor.Report.
    """

    def __init__(self, record: ServiceRecord, report: Report) -> None:
        self._record = record
        self._path = Path(record.directory) / FILE_NAME
        self._report = report
        self._write()

    def starting(self, name: str, pid: int) -> None:
        """See Report."""
        known = self._record.processes.get(name)
        restarts = 0 if known is None else known.restarts + 1
        self._record.processes[name] = ProcessRecord(pid, STARTING, restarts)
        self._write()
        self._report.starting(name, pid)

    def ready(self, name: str, seconds: float, status: str) -> None:
        """See Report."""
        self._enter(name, READY)
        self._report.ready(name, seconds, status)

    def hung(self, name: str, seconds: float) -> None:
        """See Report."""
        self._report.hung(name, seconds)

    def log_line(self, name: str, line: str) -> None:
        """See Report."""
        self._report.log_line(name, line)

    def died(self, name: str, how: str, restart_in: float) -> None:
        """See Report."""
        self._enter(name, RESTARTING)
        self._report.died(name, how, restart_in)

    def stopping(self, name: str) -> None:
        """See Report."""
        self._enter(name, STOPPING)
        self._report.stopping(name)

    def stopped(self, name: str, returncode: int) -> None:
        """See Report."""
        self._record.processes.pop(name, None)
        self._write()
        self._report.stopped(name, returncode)

    def killed(self, name: str, seconds: float) -> None:
        """See Report."""
        self._report.killed(name, seconds)

    def _enter(self, name: str, state: str) -> None:
        if name in self._record.processes:
            self._record.processes[name].state = state
            self._write()

    def _write(self) -> None:
        """Replaces the file, so that a reader sees the whole of the old or of the new. A service that cannot
        write it, as on a full disk, serves all the same."""
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(dataclasses.asdict(self._record)))
            partial.replace(self._path)
        except OSError as error:
            self._report.log_line(
                "supervisor", f"'pagewire ps' may be out of date: {self._path}: {error.strerror}"
            )


def runtime_parent() -> Path:
    """Where services make their runtime directories: `$XDG_RUNTIME_DIR`, or else the temporary directory."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())


def running_services() -> list[ServiceRecord]:
    """The services that run on this machine for this user, the oldest first. What one left that was killed is
    removed. Services with another `$XDG_RUNTIME_DIR` are not seen."""
    records = []
    for path in _files():
        record = _read(path)
        if record is None or record.pid_namespace != _pid_namespace():
            continue
        if _started_ticks(record.pid) == record.started_ticks:
            records.append(record)
        else:
            shutil.rmtree(path.parent, ignore_errors=True)
    return sorted(records, key=lambda record: record.started_at)


def resident_bytes(pid: int) -> int:
    """Memory that a process holds (its resident set); 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _files() -> Iterator[Path]:
    for path in runtime_parent().glob(f"{PREFIX}*/{FILE_NAME}"):
        try:
            if path.stat().st_uid == os.getuid():
                yield path
        except OSError:
            continue  # it ended meanwhile


def _read(path: Path) -> ServiceRecord | None:
    """None for what is gone, or was written by another version in another form."""
    try:
        fields = json.loads(path.read_text())
        processes = {name: ProcessRecord(**each) for name, each in fields.pop("processes").items()}
        return ServiceRecord(**fields, processes=processes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _started_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or only its exit status."""
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
