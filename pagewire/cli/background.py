"""A service run by a command for its own use, in a thread beside the command's own work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from pagewire.cli.report import QuietReport
from pagewire.cli.service import RunningService, ServiceConfig, running_service


@contextmanager
def background_service(config: ServiceConfig) -> Iterator[RunningService]:
    """Starts a service, waits until it serves, and stops it at the end. It says only what goes wrong.

    Raises:
        PagewireError: it cannot be started.
    """
    runner = _Runner(config)
    thread = threading.Thread(target=runner.run, name="service")
    thread.start()
    try:
        yield runner.started.result()
    finally:
        runner.stop()
        thread.join()


class _Runner:
    """Owns the thread's event loop. `started` completes with the service, or with why there is none."""

    def __init__(self, config: ServiceConfig) -> None:
        self.started: Future[RunningService] = Future()
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    def run(self) -> None:
        """The thread's work."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except Exception as error:
                if self.started.done():
                    raise
                self.started.set_exception(error)

    def stop(self) -> None:
        """Asks the service to stop; from another thread."""
        with suppress(RuntimeError):  # the loop is closed: it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        async with running_service(self._config, QuietReport()) as service:
            stopped = asyncio.create_task(self._stop.wait())
            serving = asyncio.create_task(service.until_serving())
            await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                serving.result()
                self.started.set_result(service)
                await stopped
            serving.cancel()
            stopped.cancel()
