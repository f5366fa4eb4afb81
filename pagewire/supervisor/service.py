"""A set of processes run as one service."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pagewire.base.lifeline import Lifeline
from pagewire.supervisor.child import Child, ChildFailed, ProcessSpec, Report


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
        self._runtime_dir = runtime_dir
        self._report = report
        self.stages = [[self._child(spec) for spec in stage] for stage in stages]
        self.killed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: set[Child] = set()
        self._rolling: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None]

    def _child(self, spec: ProcessSpec) -> Child:
        return Child(spec, self._runtime_dir, self._lifeline, self._report)

    @property
    def children(self) -> list[Child]:
        """Every process, in the order of the stages."""
        return [*self._leaving, *(child for stage in self.stages for child in stage)]

    async def __aenter__(self) -> Self:
        self._failed = asyncio.get_running_loop().create_future()
        for child in self.children:
            self._supervise(asyncio.create_task(child.run(), name=f"supervise {child.spec.name}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rolling is not None:
            self._rolling.cancel()
            await asyncio.wait([self._rolling])
        leaving = [child.stop() for child in self._leaving]
        for stage in self.stages:
            await asyncio.gather(*leaving, *(child.stop() for child in stage))
            leaving = []
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._failed.cancel():
            self._failed.exception()  # was raised, or else came when everything was being stopped
        self._lifeline.close()

    async def until_ready(self) -> None:
        """Returns when every process has said that it is ready.

        Raises:
            ChildFailed: one of them cannot be brought up.
        """
        await self._first_of(asyncio.create_task(self._all_ready()))

    async def replace_all(self) -> None:
        """Puts a new process in the place of each that can have a successor, one after another: it starts,
        says that it is ready, and then the old one leaves. If a successor is not ready, the rest stay.

        Raises:
            ChildFailed: a successor cannot be brought up.
        """
        for stage in self.stages:
            for index, old in enumerate(stage):
                if old.spec.successor is not None:
                    new = await self._bring_up(old.spec.successor())
                    stage[index] = new
                    self._leaving.add(old)
                    await old.leave()
                    self._leaving.discard(old)

    async def _bring_up(self, spec: ProcessSpec) -> Child:
        child = self._child(spec)
        running = asyncio.create_task(child.run(), name=f"supervise {spec.name}")
        ready = asyncio.create_task(child.ready.wait())
        try:
            await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await child.stop()
            raise
        finally:
            ready.cancel()
        if running.done():
            running.result()
        self._supervise(running)
        return child

    def _supervise(self, running: asyncio.Task[None]) -> None:
        """Has the service fail if this process is given up."""
        self._tasks.append(running)
        running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._tasks.remove(running)
        if not running.cancelled() and (error := running.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    def _replace_in_background(self) -> None:
        """What SIGHUP asks for; nothing if it is being done already."""
        if self._rolling is None or self._rolling.done():
            self._rolling = asyncio.create_task(self._replace_or_say_why_not())

    async def _replace_or_say_why_not(self) -> None:
        try:
            await self.replace_all()
        except ChildFailed as error:
            self._report.log_line("supervisor", f"the old processes stay: {error}")

    async def serve(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        """Runs until SIGTERM or SIGINT; a second signal kills what has not ended by then. On SIGHUP processes
        that can are replaced, see `replace_all`.

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
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._replace_in_background)
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
            done, _ = await asyncio.wait((*awaited, self._failed), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            for task in awaited:
                task.cancel()
            raise
        for finished in done:
            finished.result()
