"""How far an export is, on stderr: a bar on a terminal, a line for every tenth of the layers elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Told the layers that are done.
Report = Callable[[int], None]


@contextmanager
def layer_progress(label: str, total: int, done_before: int) -> Iterator[Report]:
    """Shows how many of `total` parts are done."""
    if done_before:
        print(f"{done_before} of {total} parts are there from before", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        yield _Tenths(label, total, done_before)
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done_before)
        yield lambda done: bar.update(task, completed=done)


class _Tenths:
    def __init__(self, label: str, total: int, done_before: int) -> None:
        self._label, self._total = label, total
        self._next = 10 * done_before // max(total, 1) + 1

    def __call__(self, done: int) -> None:
        tenth = 10 * done // max(self._total, 1)
        if tenth >= self._next:
            self._next = tenth + 1
            print(f"{self._label}: {done} of {self._total} parts", file=sys.stderr, flush=True)
