"""Finds marks in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def split_at_marker(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Text before the first marker, that marker, and what follows; or the text that is certainly part of no
    marker, None, and the rest that may be the beginning of one."""
    found = [(text.index(marker), marker) for marker in markers if marker in text]
    if found:
        # Of two that begin together, one is the beginning of the other; the longer is meant.
        start, marker = min(found, key=lambda each: (each[0], -len(each[1])))
        return text[:start], marker, text[start + len(marker) :]
    certain = min((_possible_start(text, marker) for marker in markers), default=len(text))
    return text[:certain], None, text[certain:]


def _possible_start(text: str, marker: str) -> int:
    """Where the longest end of the text starts that is a proper beginning of the marker."""
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0:
        if marker.startswith(text[start:]):
            return start
        start = text.find(marker[0], start + 1)
    return len(text)
