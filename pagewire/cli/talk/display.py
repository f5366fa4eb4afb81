"""An answer on the terminal while it comes: thoughts dim, text, and the tools that the model calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# A model's text may hold escape sequences, which would move the cursor, change the title or worse.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Display:
    """Writes one answer.

    Args:
        console: where it goes.
        thoughts: whether what the model thinks is shown.
    """

    def __init__(self, console: Console, *, thoughts: bool) -> None:
        self._console = console
        self._shows_thoughts = thoughts
        self._part = ""
        self._at_line_start = True

    def thought(self, text: str) -> None:
        """More of what the model thinks before it answers."""
        if text and self._shows_thoughts:
            self._begin("thoughts", "thinking: ")
            self._write(text, "dim italic")

    def text(self, text: str) -> None:
        """More of the answer."""
        if text:
            self._begin("text")
            self._write(text, "green")

    def call(self, name: str, arguments: str) -> None:
        """A whole call of a tool."""
        self._begin("call")
        self._write(f"calls {name}({arguments})\n", "cyan")

    def note(self, text: str) -> None:
        """Something about the answer, such as why it ended."""
        self._write(("" if self._at_line_start else " ") + text, "dim")

    def end(self) -> None:
        """Leaves the cursor at the beginning of a line."""
        if not self._at_line_start or not self._part:
            self._write("\n", "")

    def _begin(self, part: str, heading: str = "") -> None:
        """What is of another kind than what came before begins a line."""
        if part != self._part:
            if not self._at_line_start:
                self._write("\n", "")
            self._part = part
            if heading:
                self._write(heading, "dim")

    def _write(self, text: str, style: str) -> None:
        text = text.translate(_CONTROLS)
        if text:
            self._console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
            self._at_line_start = text.endswith("\n")
