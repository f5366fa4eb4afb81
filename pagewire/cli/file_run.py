"""A file of lines under way: what has come of it, and, on stderr, how far it is."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pagewire.base.errors import ConfigError, PagewireError
from pagewire.base.exit_status import UNFINISHED

Report = Callable[[int, int], None]
"""Called with the lines done so far, and how many of them with an error."""


@contextmanager
def line_progress(total: int) -> Iterator[Report]:
    """Shows how many of `total` lines are done: by a bar on a terminal, by a line every tenth elsewhere."""
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


@dataclass(slots=True)
class FileRun:
    """A file of lines under way, of which runs before may have done some.

    Attributes:
        total: its lines.
        num_done: lines that have a result.
        num_before: those of them that runs before this made.
        num_failed: those of them that are about an error.
        num_tokens: tokens that this run generated.
        seconds: how long it took.
        error: what ended it early.
    """

    total: int = 0
    num_done: int = 0
    num_before: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def num_left(self) -> int:
        """Lines without a result."""
        return self.total - self.num_done

    def add(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        """Counts lines that have got a result."""
        self.num_done += num_done
        self.num_failed += num_failed
        self.num_tokens += num_tokens

    def run(self, work: Callable[[Report], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` and shows how far it is. What ends it early is in `error` then.

        Raises:
            ConfigError: the work cannot be done at all.
        """
        started = time.monotonic()
        try:
            with line_progress(self.total) as report:
                report(self.num_done, self.num_failed)
                asyncio.run(work(report))
        except ConfigError:
            raise
        except PagewireError as error:
            self.error = error.message
        except KeyboardInterrupt:
            self.error = "interrupted"
        self.seconds = time.monotonic() - started

    def summary(self, what: str) -> str:
        """What people are told at the end. `what` has become of the lines that are done, and where."""
        parts = [f"{self.num_done:,} of {self.total:,} lines {what}"]
        if self.num_before:
            parts.append(f"{self.num_before:,} of them before")
        if self.num_failed:
            parts.append(f"{self.num_failed:,} with errors")
        if self.num_tokens:
            rate = self.num_tokens / max(self.seconds, 1e-9)
            parts.append(f"{self.num_tokens:,} tokens in {self.seconds:.1f} s ({rate:,.0f} tokens/s)")
        end = f"\nended early: {self.error}\nrun the same command to go on" if self.num_left else ""
        return ", ".join(parts) + end

    @property
    def exit_status(self) -> int:
        """0 if every line has a result, 1 if some of them are errors, UNFINISHED if some lines have none."""
        if self.num_left:
            return UNFINISHED
        return 1 if self.num_failed else 0
