"""Ray actors, each of which runs and watches one of the service's processes.

An actor restarts its process when that dies, as the supervisor does on one machine. When the actor dies, its
process sees the end of a pipe and ends too, and Ray starts the actor anew, on another node if its own is
gone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from pagewire.base.command_line import arguments, environment
from pagewire.base.errors import PagewireError
from pagewire.base.lifeline import Lifeline
from pagewire.base.own_packages import python_command, python_path
from pagewire.on_ray.plan import RayService
from pagewire.supervisor import Child, ProcessSpec

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0


class LoggingReport:
    """Writes what happens to the actor's log, which Ray collects. Implements pagewire.supervisor.Report."""

    def starting(self, name: str, pid: int) -> None:
        """See Report."""
        print(f"{name} | starting, pid {pid}", flush=True)

    def ready(self, name: str, seconds: float, status: str) -> None:
        """See Report."""
        print(f"{name} | ready after {seconds:.1f} s: {status}", flush=True)

    def hung(self, name: str, seconds: float) -> None:
        """See Report."""
        print(f"{name} | not ready after {seconds:.0f} s; killed", flush=True)

    def log_line(self, name: str, line: str) -> None:
        """See Report."""
        print(f"{name} | {line}", flush=True)

    def died(self, name: str, how: str, restart_in: float) -> None:
        """See Report."""
        print(f"{name} | {how}; restarting in {restart_in:g} s", flush=True)

    def stopping(self, name: str) -> None:
        """See Report."""

    def stopped(self, name: str, returncode: int) -> None:
        """See Report."""
        print(f"{name} | stopped with status {returncode}", flush=True)

    def killed(self, name: str, seconds: float) -> None:
        """See Report."""
        print(f"{name} | killed after {seconds:g} s", flush=True)


class ProcessActor:
    """Owns one process. A thread of its own watches it, so that Ray's calls are answered at any time."""

    def __init__(self, name: str, module: str, config: Any) -> None:
        self._error = ""
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-ray-actor-")
        self._lifeline = Lifeline()
        spec = ProcessSpec(
            name=name,
            command=(*python_command(module), *arguments(config)),
            environment={**python_path(), **environment(config)},
        )
        self._child: Child | None = None
        self._loop = asyncio.new_event_loop()
        self._made = threading.Event()
        threading.Thread(target=self._watch, args=(spec,), name=f"watch {name}", daemon=True).start()
        self._made.wait()

    def _watch(self, spec: ProcessSpec) -> None:
        async def run() -> None:
            self._child = Child(spec, Path(self._directory.name), self._lifeline, LoggingReport())
            self._made.set()
            await self._child.run()

        try:
            self._loop.run_until_complete(run())
        except PagewireError as error:
            self._error = str(error)
            logger.error("%s", error)

    def state(self) -> dict[str, Any]:
        """Its process's id, whether it is ready, and why it was given up, if it was."""
        assert self._child is not None
        return {
            "pid": self._child.pid,
            "ready": self._child.ready.is_set(),
            "error": self._error,
            "node": ray.util.get_node_ip_address(),
            "node_id": ray.get_runtime_context().get_node_id(),
        }

    def stop(self) -> None:
        """Asks the process to end and waits for it."""
        if self._child is not None and not self._error:
            asyncio.run_coroutine_threadsafe(self._child.stop(), self._loop).result()


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=1)
class SchedulerActor(ProcessActor):
    """A replica's scheduler. It tells frontends where it is."""

    def __init__(self, service: RayService, replica: int) -> None:
        directory = _made(service.directory(replica, Path(tempfile.gettempdir())))
        self._address = f"{ray.util.get_node_ip_address()}:{_free_port()}"
        super().__init__(
            f"scheduler-{replica}", "scheduler", service.scheduler_of(replica, directory, self._address)
        )

    def address(self) -> str:
        """HOST:PORT of the scheduler."""
        return self._address


@ray.remote(max_restarts=-1, max_task_retries=3)
class RankActor(ProcessActor):
    """A rank of a replica, beside its scheduler."""

    def __init__(self, service: RayService, replica: int, rank: int) -> None:
        directory = _made(service.directory(replica, Path(tempfile.gettempdir())))
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        config = service.rank_of(rank, directory, gpus[0] if gpus else "")
        super().__init__(f"engine-worker-{replica}-{rank}", "engine", config)


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=1)
class FrontendActor(ProcessActor):
    """A frontend. It asks the schedulers' actors where they are, again and again, and writes that to a file,
    which its process reads."""

    def __init__(self, service: RayService, number: int, namespace: str) -> None:
        self._service, self._namespace = service, namespace
        self._file = Path(tempfile.mkdtemp(prefix="pagewire-ray-")) / "schedulers"
        self._known: dict[int, str] = {}
        self._write()
        config = replace(service.frontend, scheduler=f"file:{self._file}", reuse_port=True)
        threading.Thread(target=self._look, name="find schedulers", daemon=True).start()
        super().__init__(f"frontend-{number}", "frontend", config)

    def _look(self) -> None:
        while True:
            for replica in range(self._service.data_parallel_size):
                self._known |= self._ask(replica)
            self._write()
            time.sleep(LOOK_SECONDS)

    def _ask(self, replica: int) -> dict[int, str]:
        """Where a replica's scheduler is; empty while nobody says, since it may be there all the same."""
        try:
            actor = ray.get_actor(f"{self._service.name}-scheduler-{replica}", self._namespace)
            return {replica: ray.get(actor.address.remote(), timeout=_ANSWER_SECONDS)}
        except (ValueError, ray.exceptions.RayError) as error:
            logger.warning("scheduler %d cannot be found: %s", replica, error)
            return {}

    def _write(self) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text("".join(f"{address}\n" for address in self._known.values()))
        partial.replace(self._file)

    def address(self) -> str:
        """HOST:PORT of the HTTP API."""
        return f"{ray.util.get_node_ip_address()}:{self._service.frontend.port}"


def _made(directory: Path) -> Path:
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
