"""Progress of long work, on stderr: a bar on a terminal, a line every quarter elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
"""Called with the number of bytes done so far (not since the last call)."""


@contextmanager
def report_progress(label: str, total_bytes: int, *, enabled: bool) -> Iterator[Advance]:
    """Shows the progress of `total_bytes` of work, if enabled."""
    if not enabled:
        yield _silent
    elif sys.stderr.isatty():
        with _bar(label, total_bytes) as advance:
            yield advance
    else:
        yield _Lines(label, total_bytes)


def say(message: str, *, enabled: bool) -> None:
    """One line for people on stderr, if enabled."""
    if enabled:
        print(message, file=sys.stderr, flush=True)


def _silent(_done: int) -> None:
    """Nobody asked to see it."""


@contextmanager
def _bar(label: str, total_bytes: int) -> Iterator[Advance]:
    # Imported here because a cached model, the usual case, needs no bar.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda done: bar.update(task, completed=min(done, total_bytes))
        bar.update(task, completed=total_bytes)


class _Lines:
    """Prints when the work starts and at every further quarter."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._next_quarter = 0
        self(0)

    def __call__(self, done: int) -> None:
        quarter = 4 * min(done, self._total_bytes) // max(self._total_bytes, 1)
        if quarter < self._next_quarter:
            return
        self._next_quarter = quarter + 1
        say(f"{self._label}: {25 * quarter}% of {self._total_bytes / 1e6:,.0f} MB", enabled=True)
