"""A real `pagewire serve` under test or load: its processes, addresses and metrics."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from pagewire.base.own_packages import python_command, python_path

READY_SECONDS = 90.0
# Without this httpx reads all certificates that the system trusts for every call: 50 ms, for plain HTTP.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass
class Service:
    """A running service. `options` are those of the command line. It runs in `directory_to_run_in`, by
    default the current one.

    Attributes:
        http_url: such as http://127.0.0.1:8000.
        grpc_target: such as 127.0.0.1:50051.
        model: the name that requests use.
    """

    directory: Path
    model: str = "smollm2-135m"
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    directory_to_run_in: Path | None = None

    def __post_init__(self) -> None:
        port, grpc_port = free_ports(2)
        self.http_url = f"http://127.0.0.1:{port}"
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.log_path = self.directory / f"serve-{port}.log"
        ports = ("--port", str(port), "--grpc-port", str(grpc_port))
        options = ("--host", "127.0.0.1", *ports, *self.options)
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*python_command("pagewire"), "serve", self.model, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "2", **os.environ, **python_path(), **self.environment},
                cwd=self.directory_to_run_in,
            )

    def wait_ready(self) -> Service:
        """Returns when a request would be served."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.log}")
            try:
                if httpx.get(f"{self.http_url}/ready", timeout=5, verify=NO_CERTIFICATES).status_code == 200:
                    return self
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.05)
        raise AssertionError(f"not ready after {READY_SECONDS} s:\n{self.log}")

    @property
    def log(self) -> str:
        """What all processes have printed."""
        return self.log_path.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics without histogram buckets, by name (labels included)."""
        text = httpx.get(f"{self.http_url}/metrics", timeout=30, verify=NO_CERTIFICATES).text
        samples = re.findall(r"^([a-zA-Z_:]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in samples if "_bucket" not in name}

    def processes(self) -> dict[str, psutil.Process]:
        """By role: "supervisor", and of its children one "frontend", "scheduler" and "engine-worker"."""
        return {"supervisor": psutil.Process(self.process.pid), **dict(self._children())}

    def processor_seconds(self) -> dict[str, float]:
        """User and system time that each role's processes have taken so far, together."""
        seconds: dict[str, float] = {}
        for role, child in self._children():
            seconds[role] = seconds.get(role, 0.0) + processor_seconds(child)
        return seconds

    def _children(self) -> list[tuple[str, psutil.Process]]:
        roles = {"frontend": "frontend", "scheduler": "scheduler", "engine": "engine-worker"}
        return [
            (role, child)
            for child in psutil.Process(self.process.pid).children()
            for word, role in roles.items()
            if word in child.cmdline()[:5]
        ]

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Service:
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def processor_seconds(process: psutil.Process) -> float:
    """User and system time that a process has taken so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at present."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
