"""What a frontend and the processes that render its templates say to each other. Quick to import.

A request is 8 bytes of length and JSON {"source", "seconds", "variables"}, without variables if the source is
only to be compiled. The answer is a letter, 8 bytes of length and UTF-8.
"""

from __future__ import annotations

MEMORY_BYTES = 512 * 1024**2

TEXT, TOO_LONG, TOO_DEEP, FAILED, WRONG = b"T", b"L", b"D", b"F", b"W"
"""Answers: what the template wrote; that it wrote too much, or calls itself too often; why it raised; why it
does not compile."""

NESTED = "it has values that are nested too deeply"
LENGTH_BYTES = 8
READY = b"R"
"""Written once, before the first answer."""


class PromptTooLong(Exception):
    """A template wrote more than it may."""
