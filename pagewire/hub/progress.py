"""Progress of long work, on stderr: a bar on a terminal, a line every quarter elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
"""Called with the number of bytes done so far (not since the last call)."""

_WORTH_A_WORD = 0.01
"""Small files are always there already."""


@contextmanager
def report_progress(
    label: str, total_bytes: int, *, enabled: bool, done_before: int = 0
) -> Iterator[Advance]:
    """Shows the progress of `total_bytes` of work, if enabled.

    Args:
        done_before: how much of it an earlier run has done. What is told then is how much this one has done.
    """
    if not enabled:
        yield _silent
        return
    if done_before > total_bytes * _WORTH_A_WORD:
        say(
            f"{label}: {done_before / 1e6:,.1f} of {total_bytes / 1e6:,.1f} MB are here, going on from there",
            enabled=True,
        )
    if sys.stderr.isatty():
        with _bar(label, total_bytes, done_before) as advance:
            yield advance
    else:
        lines = _Lines(label, total_bytes, done_before)
        yield lambda done: lines(done_before + done)


def say(message: str, *, enabled: bool) -> None:
    """One line for people on stderr, if enabled."""
    if enabled:
        print(message, file=sys.stderr, flush=True)


def _silent(_done: int) -> None:
    """Nobody asked to see it."""


@contextmanager
def _bar(label: str, total_bytes: int, done_before: int) -> Iterator[Advance]:
    # Imported here because a cached model, the usual case, needs no bar.
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes, completed=done_before)
        yield lambda done: bar.update(task, completed=min(done_before + done, total_bytes))
        bar.update(task, completed=total_bytes)


class _Lines:
    """Prints when the work starts and at every further quarter."""

    def __init__(self, label: str, total_bytes: int, done: int) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._next_quarter = 0
        self(done)

    def __call__(self, done: int) -> None:
        quarter = 4 * min(done, self._total_bytes) // max(self._total_bytes, 1)
        if quarter < self._next_quarter:
            return
        self._next_quarter = quarter + 1
        say(f"{self._label}: {25 * quarter}% of {self._total_bytes / 1e6:,.0f} MB", enabled=True)
