"""What people see of the processes of a service."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from pagewire.supervisor import describe
from pagewire.telemetry.logs import FIELDS, JsonFormatter

if TYPE_CHECKING:
    from rich.console import Console


class ConsoleReport:
    """Prints every event and every line the processes write, with the process's name before it.

    In colour on a terminal. Implements pagewire.supervisor.Report.
    """

    def __init__(self, console: Console, name_width: int) -> None:
        self._console = console
        self._width = name_width

    def say(self, text: str) -> None:
        """Something about the service as a whole."""
        self._console.print(text, soft_wrap=True)

    def starting(self, name: str, pid: int) -> None:
        self._say(name, f"starting, pid {pid}", "dim")

    def ready(self, name: str, seconds: float, status: str) -> None:
        self._say(name, f"ready after {seconds:.1f} s{': ' if status else ''}{status}", "green")

    def hung(self, name: str, seconds: float) -> None:
        self._say(name, f"not ready within {seconds:g} s; killed", "bold red")

    def log_line(self, name: str, line: str) -> None:
        self._say(name, line, "")

    def died(self, name: str, how: str, restart_in: float) -> None:
        when = f"in {restart_in:g} s" if restart_in else "now"
        self._say(name, f"{how}; restarting {when}", "bold red")

    def stopping(self, name: str) -> None:
        self._say(name, "stopping", "dim")

    def stopped(self, name: str, returncode: int) -> None:
        if returncode == 0:
            self._say(name, "stopped", "dim")
        else:
            self._say(name, f"{describe(returncode)} while it was stopping", "bold red")

    def killed(self, name: str, seconds: float) -> None:
        self._say(name, f"did not stop within {seconds:g} s; killed", "bold red")

    def _say(self, name: str, text: str, style: str) -> None:
        from rich.text import Text

        line = Text.assemble((name.ljust(self._width), "cyan"), " | ", (text, style))
        self._console.print(line, soft_wrap=True)


class JsonReport:
    """Writes every event as a JSON object on stdout, in the form of the processes' own logs (see
    pagewire/telemetry/logs.py), whose lines go through as they are. Implements pagewire.supervisor.Report.
    """

    def __init__(self) -> None:
        self._formatter = JsonFormatter("supervisor")

    def say(self, text: str) -> None:
        """Something about the service as a whole."""
        self._write(logging.INFO, text)

    def starting(self, name: str, pid: int) -> None:
        self._write(logging.INFO, f"{name} is starting, pid {pid}", child=name, child_pid=pid)

    def ready(self, name: str, seconds: float, status: str) -> None:
        what = f"{name} is ready after {seconds:.1f} s{': ' if status else ''}{status}"
        self._write(logging.INFO, what, child=name)

    def hung(self, name: str, seconds: float) -> None:
        self._write(logging.ERROR, f"{name} was not ready within {seconds:g} s; killed", child=name)

    def log_line(self, name: str, line: str) -> None:
        if line.startswith("{"):
            print(line, flush=True)
        else:  # what libraries and the interpreter write
            self._write(logging.WARNING, line, child=name)

    def died(self, name: str, how: str, restart_in: float) -> None:
        when = f"in {restart_in:g} s" if restart_in else "now"
        self._write(logging.ERROR, f"{name} {how}; restarting {when}", child=name)

    def stopping(self, name: str) -> None:
        self._write(logging.INFO, f"{name} is stopping", child=name)

    def stopped(self, name: str, returncode: int) -> None:
        if returncode == 0:
            self._write(logging.INFO, f"{name} stopped", child=name)
        else:
            self._write(logging.ERROR, f"{name} {describe(returncode)} while it was stopping", child=name)

    def killed(self, name: str, seconds: float) -> None:
        self._write(logging.ERROR, f"{name} did not stop within {seconds:g} s; killed", child=name)

    def _write(self, level: int, text: str, **fields: Any) -> None:
        record = logging.LogRecord("pagewire.supervisor", level, "", 0, text, None, None)
        setattr(record, FIELDS, fields)
        print(self._formatter.format(record), flush=True)


class QuietReport:
    """Says only what goes wrong, on stderr. Implements pagewire.supervisor.Report."""

    def starting(self, name: str, pid: int) -> None:
        """Nothing to say."""

    def ready(self, name: str, seconds: float, status: str) -> None:
        """Nothing to say."""

    def hung(self, name: str, seconds: float) -> None:
        print(f"{name} was not ready within {seconds:g} s; killed", file=sys.stderr)

    def log_line(self, name: str, line: str) -> None:
        """Nothing to say: the last lines are part of the error if the process fails."""

    def died(self, name: str, how: str, restart_in: float) -> None:
        print(f"{name} {how}; restarting in {restart_in:g} s", file=sys.stderr)

    def stopping(self, name: str) -> None:
        """Nothing to say."""

    def stopped(self, name: str, returncode: int) -> None:
        """Nothing to say."""

    def killed(self, name: str, seconds: float) -> None:
        print(f"{name} did not stop within {seconds:g} s; killed", file=sys.stderr)
