"""How long `pagewire serve` takes until it serves, with empty kernel caches and with full ones."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pagewire.base.errors import PagewireError
from pagewire.base.lifeline import Lifeline

HOST = "127.0.0.1"
SERVED_NAME = "bench"
SUPERVISOR = "serve"
POLL_SECONDS = 0.01
REQUEST_SECONDS = 60.0
STOP_SECONDS = 60.0
# Where compiled kernels are kept; the model is named by its directory, so that it stays reachable.
CACHES = ("PAGEWIRE_HOME", "TRITON_CACHE_DIR")
MAX_LINES = 400

_LINE = re.compile(r"(\S+)\s*\| (.*)")
_WORKER_TOLD = re.compile(r"\b(?:compiled \d+ kernels|started in) .*")
"""Where a worker's time went, as its log has it."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of `pagewire serve`: seconds after the start, which process wrote it, and its text."""

    seconds: float
    process: str
    text: str


@dataclass(slots=True)
class Start:
    """One start.

    Attributes:
        ready_s: from the start of the process until /ready said yes.
        first_token_s: from then until the first token of a first request, of 16 tokens.
        ready_by_process: seconds until each process was ready, by name.
        stop_s: from SIGTERM until it had ended.
        log: what the processes wrote.
    """

    ready_s: float
    first_token_s: float
    ready_by_process: dict[str, float]
    stop_s: float
    log: list[LogLine] = field(default_factory=list)


def measure_startup(arguments: Sequence[str], *, repeat: int, timeout: float) -> dict[str, Any]:
    """Starts and stops the service in pairs: with empty caches, then with the caches that start left behind.

    The system's own file cache is not emptied: from the second start on, files come from memory.

    Args:
        arguments: of `pagewire serve`, MODEL as a directory; without addresses and ports.
        timeout: seconds a start may take.

    Returns:
        "cold" and "warm", each with every start, the medians over them, and the log of the start in the
        middle.

    Raises:
        PagewireError: it did not start, serve or stop as it should.
    """
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(prefix="pagewire-bench-", ignore_cleanup_errors=True) as directory:
            caches = {name: str(Path(directory) / name.lower()) for name in CACHES}
            for path in caches.values():
                Path(path).mkdir()
            for kind in ("cold", "warm"):
                starts[kind].append(start_once(arguments, caches, timeout))
    return {kind: _summary(each) for kind, each in starts.items()}


def start_once(arguments: Sequence[str], environment: dict[str, str], timeout: float) -> Start:
    """Starts the service once, asks it for a token, and stops it. See measure_startup."""
    port, grpc_port = _free_ports()
    service = _Service(arguments, port, grpc_port, environment)
    try:
        ready = service.wait_ready(timeout)
        first_token = service.first_token()
        stop = service.stop()
    finally:
        service.close()
    log = service.log()  # whole now
    processes = {
        line.process: line.seconds
        for line in reversed(log)
        if line.text.startswith("ready after") and line.process != SUPERVISOR
    }
    return Start(ready, first_token, processes, stop, log)


class _Service:
    """A `pagewire serve` that was started now. Ends with this process, however that ends."""

    def __init__(
        self, arguments: Sequence[str], port: int, grpc_port: int, environment: dict[str, str]
    ) -> None:
        command = [sys.executable, "-m", "pagewire", "serve", *arguments, "--host", HOST]
        command += ["--port", str(port), "--grpc-port", str(grpc_port), "--served-model-name", SERVED_NAME]
        self._port = port
        self._lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        self._lifeline = Lifeline()
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment, **self._lifeline.environment()},
            pass_fds=(self._lifeline.child_fd,),
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            match = _LINE.match(line)
            process, text = match.groups() if match else (SUPERVISOR, line.strip())
            if text:
                self._lines.append(LogLine(round(time.perf_counter() - self._began, 3), process, text))

    def log(self) -> list[LogLine]:
        """The lines so far; the first ones are lost if there are very many."""
        return list(self._lines)

    def wait_ready(self, timeout: float) -> float:
        """Seconds from the start until /ready answered 200.

        Raises:
            PagewireError: the service ended, or the time is up. With its last lines.
        """
        while time.perf_counter() - self._began < timeout:
            if self._process.poll() is not None:
                raise self._failed(f"ended with status {self._process.returncode} before it was ready")
            with suppress(OSError, http.client.HTTPException):  # nobody listens yet
                if self._is_ready():
                    return time.perf_counter() - self._began
            time.sleep(POLL_SECONDS)
        raise self._failed(f"was not ready after {timeout:g} s")

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=REQUEST_SECONDS)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        finally:
            connection.close()

    def first_token(self) -> float:
        """Seconds until the first token of a streamed request.

        Raises:
            PagewireError: it was not answered.
        """
        began = time.perf_counter()
        body = {
            "model": SERVED_NAME,
            "prompt": list(range(10, 26)),
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection(HOST, self._port, timeout=REQUEST_SECONDS)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            line = response.readline().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"did not answer a request: {error}") from error
        finally:
            connection.close()
        if response.status != 200 or not line.startswith("data:") or '"error"' in line:
            raise self._failed(f"answered a request with {response.status}: {line}")
        return time.perf_counter() - began

    def stop(self) -> float:
        """Seconds from SIGTERM to the end.

        Raises:
            PagewireError: it ended with a status other than 0, or not at all.
        """
        began = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not stop within {STOP_SECONDS:g} s") from None
        if status != 0:
            raise self._failed(f"ended with status {status} when it was stopped")
        return time.perf_counter() - began

    def close(self) -> None:
        """Lets go of the processes; whatever still runs is ended by its lifeline or killed here."""
        self._lifeline.close()
        if self._process.poll() is None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _failed(self, what: str) -> PagewireError:
        last = "\n".join(f"  {line.process} | {line.text}" for line in self.log()[-20:])
        return PagewireError(f"pagewire serve {what}; its last lines:\n{last}")


def _free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on at present."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind((HOST, 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def _summary(starts: list[Start]) -> dict[str, Any]:
    processes = starts[0].ready_by_process
    middle = sorted(starts, key=lambda start: start.ready_s)[len(starts) // 2]
    return {
        "ready_s": round(statistics.median(start.ready_s for start in starts), 2),
        "first_token_after_ready_s": round(statistics.median(start.first_token_s for start in starts), 3),
        "ready_by_process_s": {
            name: round(statistics.median(start.ready_by_process[name] for start in starts), 2)
            for name in processes
        },
        "runs": [
            {
                "ready_s": round(start.ready_s, 3),
                "first_token_after_ready_s": round(start.first_token_s, 4),
                "ready_by_process_s": start.ready_by_process,
                "stop_s": round(start.stop_s, 2),
                "worker": [text for line in start.log for text in _WORKER_TOLD.findall(line.text)],
            }
            for start in starts
        ],
        "log": [f"{line.seconds:8.3f} {line.process} | {line.text}" for line in middle.log],
    }
