"""A thread that waits for the scheduler to go."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class Watch:
    """A thread that waits for a descriptor to become readable, and then calls once."""

    def __init__(self, fd: int, call: Callable[[], None]) -> None:
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._fd, self._call = fd, call
        self._thread = threading.Thread(target=self._run, name="group watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLRDHUP)
        poll.register(self._stop_fd, select.POLLIN)
        if self._stop_fd not in dict(poll.poll()):
            self._call()

    def close(self) -> None:
        """Ends it."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
