"""Reads calls written in JSON as they come, one character after another."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto

from frontend.chat.tool_parsers.protocol import Arguments, Call, Event

_SPACE = " \t\r\n"
_NAME_KEYS = ("name", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters")
_PLAIN = re.compile(r'[^"\\{}\[\]]+')
_CALL_KEYS = (*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id")


class JsonValue:
    """Finds the end of one JSON value. It follows strings and brackets only: a value that a model gets
    slightly wrong still ends where it was meant to.

    Attributes:
        done: whether the value is complete.
    """

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, character: str) -> bool:
        """Takes the next character and says whether it belongs to the value. The end of a number or a word
        shows only by the character behind it."""
        if self._in_string:
            self._within_string(character)
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            if self._depth == 0:
                self.done = True
                return False
            self._depth -= 1
            self.done = self._depth == 0
        elif self._depth == 0 and character in ",; \t\r\n":
            self.done = True
            return False
        return True

    def plain_until(self, text: str, start: int) -> int:
        """The end of the characters from `start` on that can be taken together: they end nothing."""
        if self._escaped or self._depth == 0:
            return start
        match = _PLAIN.match(text, start)
        return start if match is None else match.end()

    def _within_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.done = self._depth == 0


class State(Enum):
    """How far a call has come."""

    READING = auto()
    DONE = auto()
    BROKEN = auto()
    """It is no call; or, once its arguments were complete, something else follows them than JSON would."""


class _At(Enum):
    """What comes next in the object."""

    OPENING = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_KEY = auto()
    IN_VALUE = auto()
    COMMA = auto()


class JsonCall:
    """One object with the name and the arguments of a call, such as {"name": "f", "arguments": {"a": 1}}.

    The call begins when both its name and the beginning of its arguments are known, so that an object which
    is something else is never taken for a call. Arguments come out as the model wrote them.

    Attributes:
        state: whether more is to be read.
        begun: whether the call was returned.
        raw: the text so far of an object that is no call yet.
    """

    def __init__(self, *, only: Collection[str] | None = None) -> None:
        """Args:
        only: names that are functions, where nothing else tells a call from any other object: then one with
            another name or other keys, or without arguments, is no call. None takes every name, and no
            arguments for none.
        """
        self.state = State.READING
        self.begun = False
        self._only = only
        self._raw: list[str] = []
        self._at = _At.OPENING
        self._value = JsonValue()
        self._key = ""
        self._token: list[str] = []
        self._name: str | None = None
        self._arguments: list[str] = []
        self._seen_arguments = False
        self._in_text = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, character: str) -> list[Event]:
        """Takes the next character. The one that breaks the object is part of `raw`, unless the call has
        begun."""
        if not self.begun:
            self._raw.append(character)
        if self._at is _At.IN_VALUE:
            return self._within_value(character)
        if self._at is _At.IN_KEY:
            self._within_key(character)
        elif character not in _SPACE:
            return self._between(character)
        return []

    def plain_until(self, text: str, start: int) -> int:
        """The end of the characters from `start` on that are arguments, all of them, and need no `push`."""
        if not self.begun or self._at is not _At.IN_VALUE or not self._streams():
            return start
        return self._value.plain_until(text, start)

    def _between(self, character: str) -> list[Event]:
        """At a character of the object's own syntax, or the first of a key or value."""
        match self._at, character:
            case _At.OPENING, "{":
                self._at = _At.KEY
            case _At.KEY, '"':
                self._begin_token(_At.IN_KEY, character)
            case _At.KEY | _At.COMMA, "}":
                return self._close()
            case _At.COLON, ":":
                self._at = _At.VALUE
            case _At.VALUE, _ if character not in ",:}]":
                self._begin_token(_At.IN_VALUE, "")
                self._in_text = character == '"'
                return self._within_value(character)
            case _At.COMMA, ",":
                self._at = _At.KEY
            case _:
                self.state = State.BROKEN
        return []

    def _begin_token(self, at: _At, character: str) -> None:
        self._at = at
        self._token = [character] if character else []
        self._value = JsonValue()
        if character:
            self._value.push(character)

    def _within_key(self, character: str) -> None:
        self._token.append(character)
        self._value.push(character)
        if self._value.done:
            self._key = _decoded("".join(self._token)) or ""
            self._at = _At.COLON
            if self._only is not None and self._key not in _CALL_KEYS:
                self.state = State.BROKEN

    def _within_value(self, character: str) -> list[Event]:
        belongs = self._value.push(character)
        if belongs:
            self._token.append(character)
        events = self._more_arguments(character) if belongs and self._streams() else []
        if self._value.done:
            self._at = _At.COMMA
            events += self._end_value()
            if not belongs and self.state is State.READING and character not in _SPACE:
                events += self._between(character)
        return events

    def _streams(self) -> bool:
        """Whether the value being read is arguments that can go out as they come."""
        return self._key in _ARGUMENT_KEYS and not self._in_text and not self._seen_arguments

    def _more_arguments(self, character: str) -> list[Event]:
        if self._token[0] != "{":
            return []  # null, or no arguments; its end will tell
        if self._name is None:
            self._arguments.append(character)
            return []
        return [*self._begin(), Arguments(character)]

    def _end_value(self) -> list[Event]:
        text = "".join(self._token)
        if self._key in _NAME_KEYS and self._name is None:
            return self._named(_decoded(text))
        if self._key not in _ARGUMENT_KEYS or self._seen_arguments:
            return []
        self._seen_arguments = True
        if text[0] == "{":
            return []
        # Some models write the arguments as a text that holds JSON, or null for none.
        inner = _decoded(text) if self._in_text else "{}" if text == "null" else None
        if inner is None or not inner.lstrip().startswith("{"):
            self.state = State.BROKEN
            return []
        self._arguments = [inner]
        return [*self._begin(), *self._release()] if self._name is not None else []

    def _named(self, name: str | None) -> list[Event]:
        if not name or (self._only is not None and name not in self._only):
            self.state = State.BROKEN
            return []
        self._name = name
        return [*self._begin(), *self._release()] if self._arguments else []

    def _begin(self) -> list[Event]:
        if self.begun:
            return []
        assert self._name is not None
        self.begun = True
        return [Call(self._name)]

    def _release(self) -> list[Event]:
        held, self._arguments = "".join(self._arguments), []
        return [Arguments(held)]

    def _close(self) -> list[Event]:
        if self._name is None or (self._only is not None and not self._seen_arguments):
            self.state = State.BROKEN
            return []
        self.state = State.DONE
        return [] if self.begun else [*self._begin(), Arguments("{}")]


def _decoded(text: str) -> str | None:
    """A JSON string's text; None if it is none, or has half of a surrogate pair, which no answer can have."""
    try:
        value = json.loads(text)
        str(value).encode()
    except ValueError:
        return None
    return value if isinstance(value, str) else None
