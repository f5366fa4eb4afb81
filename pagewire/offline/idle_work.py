"""What the worker does ahead while its program does something else than generating."""

from __future__ import annotations

import threading
import time

from engine.dispatch.control import WorkerGone
from engine.dispatch.link import WorkerLink
from scheduler.workers.group import GroupResults
from scheduler.workers.work_ahead import WorkAhead, work_ahead_plan


class IdleWork:
    """Has the worker work ahead, piece by piece, in a thread that exists only while there is something to do.
    Nobody else uses the link between `begin` and `end`.

    Args:
        link: to the worker, or all ranks.
        results: theirs.
        ahead: what there is to do.
    """

    def __init__(self, link: WorkerLink, results: GroupResults, ahead: WorkAhead) -> None:
        self._link, self._results, self._ahead = link, results, ahead
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The program may take its time now."""
        if self._ahead.more:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name="work ahead", daemon=True)
            self._thread.start()

    def end(self, seconds: float) -> bool:
        """Stops after the piece that is being done; whether that was over within so many seconds."""
        thread = self._thread
        if thread is None:
            return True
        self._stopping.set()
        thread.join(seconds)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    def _run(self) -> None:
        try:
            while (self._ahead.more and not self._stopping.is_set()) or self._ahead.in_flight:
                if not self._ahead.in_flight:
                    self._link.send_plan(work_ahead_plan())
                    self._ahead.sent(time.monotonic())
                result = self._results.wait()
                if result is not None:
                    self._ahead.finished(result.more_ahead)
        except WorkerGone:
            return  # whoever generates next says so
