"""A set of processes run as one service."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pagewire.lifeline import Lifeline
from pagewire.supervisor.child import Child, ProcessSpec, Report


class Supervisor:
    """Starts all processes at once, restarts those that die, stops them stage by stage.

    async with Supervisor(stages, runtime_dir, report) as supervisor:
        await supervisor.until_ready()

    Args:
        stages: the processes, grouped; a stage is stopped when the one before it has ended.
        runtime_dir: an existing private directory for notification sockets.
        report: told what happens.
    """

    def __init__(self, stages: Sequence[Sequence[ProcessSpec]], runtime_dir: Path, report: Report) -> None:
        self._lifeline = Lifeline()
        self.stages = [
            [Child(spec, runtime_dir, self._lifeline, report) for spec in stage] for stage in stages
        ]
        self.killed = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def children(self) -> list[Child]:
        """Every process, in the order of the stages."""
        return [child for stage in self.stages for child in stage]

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(child.run(), name=f"supervise {child.spec.name}") for child in self.children
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stage in self.stages:
            await asyncio.gather(*(child.stop() for child in stage))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lifeline.close()

    async def until_ready(self) -> None:
        """Returns when every process has said that it is ready.

        Raises:
            ChildFailed: one of them cannot be brought up.
        """
        await self._first_of(asyncio.create_task(self._all_ready()))

    async def serve(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        """Runs until SIGTERM or SIGINT; a second signal kills what has not ended by then.

        Signal handlers stay installed until the process ends, so that the second signal is heard while
        leaving the `async with` block.

        Args:
            on_ready: called once, when every process is ready.

        Raises:
            ChildFailed: a process cannot be brought up.
        """
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                self.kill()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        stopped = asyncio.create_task(stop.wait())
        starting = asyncio.create_task(self._start(on_ready))
        try:
            await self._first_of(stopped, starting)
            await self._first_of(stopped)
        finally:
            starting.cancel()
            stopped.cancel()

    def kill(self) -> None:
        """Kills every process at once; `killed` says so afterwards."""
        self.killed = True
        for child in self.children:
            child.kill()

    async def _start(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        await self._all_ready()
        await on_ready()

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.ready.wait()

    async def _first_of(self, *awaited: asyncio.Task[Any]) -> None:
        """Waits until one of these has ended, or a process is given up; raises the error of either."""
        try:
            done, _ = await asyncio.wait((*awaited, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            for task in awaited:
                task.cancel()
            raise
        for finished in done:
            finished.result()
