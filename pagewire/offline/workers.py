"""The worker processes of one program: the ranks that share its model, started and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from engine.config import WorkerConfig
from engine.dispatch.control import WorkerSilent
from engine.dispatch.link import WorkerLink
from pagewire.base.command_line import arguments
from pagewire.base.errors import ConfigError, Unavailable
from pagewire.base.exit_status import CONFIG_ERROR
from pagewire.base.lifeline import Lifeline
from pagewire.base.own_packages import python_command
from pagewire.supervisor.ranks import ranks_of
from scheduler.workers.watchdog import STACKS_SECONDS

_LAST_BYTES = 4096
_RETRY_SECONDS = 0.02
_STOP_SECONDS = 10.0


class OfflineWorkers:
    """Owns the processes, the directory of their sockets and what they write. Starts them at once.

    Args:
        worker: the configuration of the group; `socket` and `rank` are not looked at.

    Attributes:
        processes: by their ranks.
    """

    def __init__(self, worker: WorkerConfig) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-", ignore_cleanup_errors=True)
        self._socket = Path(self._directory.name) / "worker.sock"
        self._lifeline = Lifeline()
        self._logs: list[IO[bytes]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for name, rank in ranks_of(worker).items():
                self._logs.append((Path(self._directory.name) / f"{name}.log").open("w+b"))
                self.processes.append(self._start(rank, self._logs[-1]))
        except BaseException:
            self.stop()
            raise

    def _start(self, rank: WorkerConfig, log: IO[bytes]) -> subprocess.Popen[bytes]:
        config = [*arguments(rank), "--socket", str(self._socket)]
        return subprocess.Popen(
            [*python_command("engine"), *config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._lifeline.environment()},
            pass_fds=(self._lifeline.child_fd,),
            start_new_session=True,
        )

    def connect(self) -> WorkerLink:
        """Waits until all have loaded the model, and attaches to them.

        Raises:
            ConfigError: one refuses its configuration or the model.
            Unavailable: one died while it started, or does not answer.
        """
        while True:
            try:
                return WorkerLink.connect(self._socket, world_size=len(self.processes))
            except WorkerSilent as error:
                error.process.close()
                raise self.hung("the handshake") from None
            except (FileNotFoundError, ConnectionRefusedError):
                if any(process.poll() is not None for process in self.processes):
                    raise self.died() from None
            time.sleep(_RETRY_SECONDS)

    def died(self) -> ConfigError | Unavailable:
        """The error for a worker that has ended, or does so now; the others are ended too."""
        while all(process.poll() is None for process in self.processes):
            time.sleep(_RETRY_SECONDS)
        rank = next(rank for rank, process in enumerate(self.processes) if process.poll() is not None)
        log, status = self._last_log(rank), self.processes[rank].returncode
        self._kill()
        if status == CONFIG_ERROR:
            return ConfigError(log.splitlines()[-1].removeprefix("engine-worker: "))
        return Unavailable(f"{self._name(rank)} ended with status {status}:\n{log}")

    def hung(self, what: str, late: int | None = None) -> Unavailable:
        """The error for a worker that does not answer. All are ended, after they have written the stacks of
        their threads.

        Args:
            what: took too long.
            late: the rank that is behind, where it is known.
        """
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        self._kill()
        rank = late or 0
        return Unavailable(
            f"{self._name(rank)} hung and was killed: {what} did not end. Its log:\n{self._last_log(rank)}"
        )

    def _name(self, rank: int) -> str:
        return "the engine-worker" if len(self.processes) == 1 else f"the engine-worker of rank {rank}"

    def _last_log(self, rank: int) -> str:
        log = self._logs[rank]
        log.seek(0)
        return log.read()[-_LAST_BYTES:].decode(errors="replace").strip()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def stop(self) -> None:
        """Ends them, and kills those that do not end. What `connect` returned is closed by its owner."""
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """Forgets their files; they have been stopped."""
        self._lifeline.close()
        for log in self._logs:
            log.close()
        self._directory.cleanup()
