"""Reads a JSON list of calls as it comes."""

from __future__ import annotations

from collections.abc import Callable

from frontend.chat.tool_parsers.json_call import JsonCall, State
from frontend.chat.tool_parsers.protocol import Event

_SPACE = " \t\r\n"


class CallList:
    """[{"name": "f", "arguments": {...}}, ...]

    Attributes:
        state: whether more is to be read. BROKEN as soon as something is no call, or no list.
        unread: the text so far of what is no call, brackets and commas included.
    """

    def __init__(self) -> None:
        self.state = State.READING
        self.unread = ""
        self._call = JsonCall()
        self._next: Callable[[str], list[Event]] = self._opening

    def push(self, character: str) -> list[Event]:
        """Takes the next character. The one that breaks the list is part of `unread`."""
        self.unread += character
        if character in _SPACE and self._next != self._within:
            return []
        return self._next(character)

    def plain_until(self, text: str, start: int) -> int:
        """The end of the characters from `start` on that are arguments, all of them, and need no `push`."""
        return self._call.plain_until(text, start) if self._next == self._within else start

    def _opening(self, character: str) -> list[Event]:
        if character == "[":
            self._next = self._item
        else:
            self.state = State.BROKEN
        return []

    def _item(self, character: str) -> list[Event]:
        if character == "{":
            self._call = JsonCall()
            self._next = self._within
            return self._within(character)
        self.state = State.DONE if character == "]" else State.BROKEN
        return []

    def _within(self, character: str) -> list[Event]:
        events = self._call.push(character)
        if self._call.begun:
            self.unread = ""
        if self._call.state is State.DONE:
            self._next = self._behind
        elif self._call.state is State.BROKEN:
            self.unread = character if self._call.begun else self.unread
            self.state = State.BROKEN
        return events

    def _behind(self, character: str) -> list[Event]:
        if character == ",":
            self._next = self._item
        elif character == "]":
            self.state = State.DONE
        else:
            self.state = State.BROKEN
        return []
