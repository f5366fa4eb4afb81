"""How far a file of lines has come, on stderr: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with the lines done so far, and how many of them with an error."""


@contextmanager
def line_progress(total: int) -> Iterator[Report]:
    """Shows how many of `total` lines are done."""
    if not sys.stderr.isatty():
        yield _Tenths(total)
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("lines{task.fields[failed]}")),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, failed="")

        def report(done: int, failed: int) -> None:
            bar.update(task, completed=done, failed=f", {failed} with errors" if failed else "")

        yield report


class _Tenths:
    def __init__(self, total: int) -> None:
        self._total = total
        self._next = 1

    def __call__(self, done: int, failed: int) -> None:
        tenth = 10 * done // max(self._total, 1)
        if tenth >= self._next:
            self._next = tenth + 1
            errors = f", {failed} with errors" if failed else ""
            print(f"{done:,} of {self._total:,} lines{errors}", file=sys.stderr, flush=True)
