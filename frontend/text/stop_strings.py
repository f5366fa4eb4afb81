"""Finds stop strings in a text that comes in pieces, and lets nothing past them."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Watches the text of one output.

    The match that is complete first wins, as if the text came one character at a time; of several
    complete at the same character, the one that starts first. So the result does not depend on how the
    text is cut.

    Attributes:
        matched: the stop string found, once one is. After that nothing is released.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool) -> None:
        if "" in stop:
            raise ValueError("an empty stop string would match everywhere")
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._include_in_output = include_in_output
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that can be no part of a stop string."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        found = [stop for stop in self._stop if stop in pending]
        if found:
            end, start, self.matched = min(_span(pending, stop) for stop in found)
            self._held = ""
            return pending[: end if self._include_in_output else start]
        certain = len(pending)
        for stop in self._stop:
            certain = min(certain, _possible_start(pending, stop))
        self._held = pending[certain:]
        return pending[:certain]

    def flush(self) -> str:
        """The text held back, now that no more comes."""
        held, self._held = self._held, ""
        return held


def _span(text: str, stop: str) -> tuple[int, int, str]:
    """End, start and string of a stop string's first match."""
    start = text.index(stop)
    return start + len(stop), start, stop


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of the text starts that is a proper beginning of the stop string."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
