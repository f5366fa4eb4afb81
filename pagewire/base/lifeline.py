"""A pipe that ends a process's children with it, however it ends.

The parent keeps the writing end of a pipe and writes nothing; each child inherits the reading end, which
reaches its end when the parent is gone, `kill -9` included. Unlike PR_SET_PDEATHSIG this is tied to the
parent process and not to the thread that started the child, and it cannot miss a parent that died first.
"""

from __future__ import annotations

import os
import signal
import threading
import time

LIFELINE_FD = "PAGEWIRE_LIFELINE_FD"
GRACE_SECONDS = 5.0


class Lifeline:
    """The parent's end. Held open until `close` or the end of the process."""

    def __init__(self) -> None:
        self.child_fd, self._parent_fd = os.pipe()

    def environment(self) -> dict[str, str]:
        """What a child needs in its environment, besides inheriting `child_fd`."""
        return {LIFELINE_FD: str(self.child_fd)}

    def close(self) -> None:
        """Lets go. Children that still run take it for the parent's death."""
        os.close(self._parent_fd)
        os.close(self.child_fd)


def end_with_parent() -> None:
    """Called by a child at its start: from now on it gets SIGTERM when its parent is gone.

    If that does not end it within GRACE_SECONDS it is killed. Does nothing in a process that was started
    without a lifeline. The variable is removed, so that grandchildren do not mistake it for theirs.
    """
    value = os.environ.pop(LIFELINE_FD, None)
    if value is None:
        return
    fd = int(value)
    os.set_inheritable(fd, False)
    threading.Thread(target=_end_at_eof, args=(fd,), name="lifeline", daemon=True).start()


def _end_at_eof(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
