"""One supervised process: started, watched until it is ready, restarted when it dies, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pagewire.base.errors import ConfigError, PagewireError
from pagewire.base.exit_status import CONFIG_ERROR, MEANINGS
from pagewire.base.lifeline import Lifeline

# Seconds before the 1st, 2nd, ... restart in a row; the last is repeated.
BACKOFF = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# A process that was ready for this many seconds, and for twice as long as it had to wait before, starts again
# at the first of them. What dies of its own work does so earlier; what somebody kills now and then should not
# have to wait ever longer because it was hit twice in ten seconds.
STABLE_SECONDS = 5.0
_STABLE_FACTOR = 2.0
# A process that was ready once after some seconds hangs if it is not ready after so many times as many, or
# this many, the next time. Of a first start nobody knows how long it takes: it may download its model.
START_FACTOR = 10.0
LEAST_START_SECONDS = 30.0
# A process that dies this many times before it was ever ready is given up.
MAX_FAILED_STARTS = 4
LAST_LINES = 30
MAX_LOG_LINE = 64 * 1024
MAX_NOTIFICATION = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """How to run one process.

    Attributes:
        name: for logs and files, unique in the service, such as "frontend-0".
        command: program and arguments.
        environment: added to the supervisor's own.
        stop_timeout: seconds from SIGTERM to SIGKILL.
        successor: how to run one that takes its place while it still runs; None if that cannot be.
        leave_timeout: seconds from SIGUSR2, which tells it that another one has taken its place, to SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_timeout: float = 10.0
    successor: Callable[[], ProcessSpec] | None = None
    leave_timeout: float = 10.0


class Report(Protocol):
    """Told what happens to the processes, for people to see."""

    def starting(self, name: str, pid: int) -> None:
        """A process was started, for the first time or again."""

    def ready(self, name: str, seconds: float, status: str) -> None:
        """It said that it is ready, `seconds` after its start, with a status line of its own."""

    def hung(self, name: str, seconds: float) -> None:
        """It was started again, was not ready after `seconds`, and is killed."""

    def log_line(self, name: str, line: str) -> None:
        """It wrote a line to its standard output or error."""

    def died(self, name: str, how: str, restart_in: float) -> None:
        """It ended unasked; it is started again in `restart_in` seconds."""

    def stopping(self, name: str) -> None:
        """It was asked to stop."""

    def stopped(self, name: str, returncode: int) -> None:
        """It ended after it was asked to, with this return code."""

    def killed(self, name: str, seconds: float) -> None:
        """It had not stopped after `seconds` and was killed."""


class ChildFailed(PagewireError):
    """A process cannot be brought up. The message carries its last lines.

    Attributes:
        returncode: as of its last run; negative for a signal.
    """

    def __init__(self, message: str, returncode: int) -> None:
        super().__init__(message)
        self.returncode = returncode


class ChildRefused(ChildFailed, ConfigError):
    """It ended with the status that says that a setting or a model file is wrong. The message is its own."""


class Child:
    """Keeps one process running. Lives in an asyncio loop; waits only on events, never by polling.

    `ready` is set while the process has said that it is ready. The process is the leader of its own
    session, so that a terminal's Ctrl-C reaches the supervisor alone.
    """

    def __init__(self, spec: ProcessSpec, runtime_dir: Path, lifeline: Lifeline, report: Report) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        self._runtime_dir = runtime_dir
        self._lifeline = lifeline
        self._report = report
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._first_start_seconds: float | None = None
        self._start_timer: asyncio.TimerHandle | None = None
        self._ready_at = 0.0
        self._started_at = 0.0
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Runs the process, again and again, until `stop`.

        Raises:
            ChildRefused: it refuses its configuration.
            ChildFailed: it never becomes ready.
        """
        loop = asyncio.get_running_loop()
        try:
            with self._notify_socket() as notifications:
                loop.add_reader(notifications, self._on_notification, notifications)
                try:
                    await self._keep_running()
                finally:
                    loop.remove_reader(notifications)
        finally:
            self._ended.set()

    async def _keep_running(self) -> None:
        failures, delay = 0, 0.0
        while not self._stopping.is_set():
            returncode = await self._run_once()
            if self._stopping.is_set():
                self._report.stopped(self.spec.name, returncode)
                return
            failures = 1 if self._was_ready_for(max(STABLE_SECONDS, _STABLE_FACTOR * delay)) else failures + 1
            self.ready.clear()
            self._give_up_if_hopeless(returncode, failures)
            delay = BACKOFF[min(failures, len(BACKOFF)) - 1]
            self._report.died(self.spec.name, describe(returncode), delay)
            await self._sleep_unless_stopping(delay)

    def _was_ready_for(self, seconds: float) -> bool:
        return self.ready.is_set() and time.monotonic() - self._ready_at >= seconds

    async def stop(self) -> None:
        """Asks the process to stop, waits for it, and kills it and its group after its `stop_timeout`."""
        await self._end(signal.SIGTERM, self.spec.stop_timeout)

    async def leave(self) -> None:
        """The same for one whose place another one has taken, after its `leave_timeout`."""
        await self._end(signal.SIGUSR2, self.spec.leave_timeout)

    async def _end(self, number: signal.Signals, timeout: float) -> None:
        self._stopping.set()
        if self._process is not None:
            self._report.stopping(self.spec.name)
            self._process.send_signal(number)
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            self._report.killed(self.spec.name, timeout)
            self.kill()
            await self._ended.wait()

    def kill(self) -> None:
        """Kills the process and its group at once; it is not started again."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _run_once(self) -> int:
        read_fd, write_fd = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 (returns at once; the exit is awaited)
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                env=self._environment(),
                pass_fds=(self._lifeline.child_fd,),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._started_at = time.monotonic()
        self._report.starting(self.spec.name, self._process.pid)
        if self._first_start_seconds is not None:
            patience = max(LEAST_START_SECONDS, START_FACTOR * self._first_start_seconds)
            self._start_timer = asyncio.get_running_loop().call_later(patience, self._hung, patience)
        reader = _LineReader(read_fd, self._on_line)
        try:
            return await _wait_for_exit(self._process)
        finally:
            self._process = None
            self._forget_start_timer()
            reader.close()

    def _hung(self, seconds: float) -> None:
        assert self._process is not None
        self._report.hung(self.spec.name, seconds)
        os.killpg(self._process.pid, signal.SIGKILL)

    def _forget_start_timer(self) -> None:
        if self._start_timer is not None:
            self._start_timer.cancel()
            self._start_timer = None

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **self._lifeline.environment(),
            "NOTIFY_SOCKET": str(self._notify_path),
            **self.spec.environment,
        }

    @property
    def _notify_path(self) -> Path:
        return self._runtime_dir / f"{self.spec.name}.notify"

    def _notify_socket(self) -> socket.socket:
        notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notifications.bind(str(self._notify_path))
        return notifications

    def _on_notification(self, notifications: socket.socket) -> None:
        fields = dict(
            line.partition("=")[::2]
            for line in notifications.recv(MAX_NOTIFICATION).decode(errors="replace").splitlines()
        )
        if fields.get("READY") == "1" and not self.ready.is_set() and self._process is not None:
            self._ready_at = time.monotonic()
            if self._first_start_seconds is None:
                self._first_start_seconds = self._ready_at - self._started_at
            self._forget_start_timer()
            self.ready.set()
            self._report.ready(self.spec.name, self._ready_at - self._started_at, fields.get("STATUS", ""))

    def _on_line(self, line: str) -> None:
        self._last_lines.append(line)
        self._report.log_line(self.spec.name, line)

    def _give_up_if_hopeless(self, returncode: int, failures: int) -> None:
        was_ready = self._first_start_seconds is not None
        if was_ready or (returncode != CONFIG_ERROR and failures < MAX_FAILED_STARTS):
            return
        if returncode == CONFIG_ERROR and self._last_lines:
            said = self._last_lines[-1].removeprefix("engine-worker: ").removeprefix("pagewire: ")
            raise ChildRefused(f"{self.spec.name}: {said}", returncode)
        times = "" if failures == 1 else f" {failures} times in a row"
        last_lines = "\n  ".join(["; its last lines:", *self._last_lines]) if self._last_lines else ""
        raise ChildFailed(
            f"{self.spec.name} {describe(returncode)}{times} before it was ready{last_lines}", returncode
        )

    async def _sleep_unless_stopping(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


class _LineReader:
    """Splits what arrives on a pipe into lines, cut at MAX_LOG_LINE bytes. Owns the descriptor."""

    def __init__(self, fd: int, on_line: Callable[[str], None]) -> None:
        self._fd = fd
        self._on_line = on_line
        self._partial = b""
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._on_readable)

    def _on_readable(self) -> bool:
        """Takes one chunk; returns whether there may be more."""
        try:
            chunk = os.read(self._fd, MAX_LOG_LINE)
        except BlockingIOError:
            return False
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._fd)
            return False
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) >= MAX_LOG_LINE:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._on_line(line.decode(errors="replace"))
        return True

    def close(self) -> None:
        """Takes what is left in the pipe, without waiting for others that hold it open, and closes it."""
        while self._on_readable():
            pass
        if self._partial:
            self._on_line(self._partial.decode(errors="replace"))
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


async def _wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    """Waits on a pidfd, which becomes readable when the process ends; returns its return code."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


def describe(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        meaning = f" ({MEANINGS[returncode]})" if returncode in MEANINGS else ""
        return f"exited with status {returncode}{meaning}"
    return f"was killed by {signal.Signals(-returncode).name}"
