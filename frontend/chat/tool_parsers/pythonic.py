"""Calls as a Python list, as Llama 3.2's small and Llama 4's models and others write them:

[get_weather(city="Paris"), get_time()]
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from frontend.chat.tool_parsers.protocol import Arguments, Call, Event, Text, ToolParser

_BEGINNING = re.compile(r"\s*(\[\s*([A-Za-z_]\w*\s*(\(|\Z)|\Z)|\Z)")
"""What may still become a list of calls."""

_MAX_LENGTH = 256 * 1024


class PythonicToolParser(ToolParser):
    """A reply that is such a list, whole, is calls. They are known only at its end."""

    name = "pythonic"

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self._held = ""
        self._is_text = False

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "[func_name1(params_name1=" in template

    def push(self, text: str) -> list[Event]:
        if self._is_text:
            return [Text(text)]
        self._held += text
        if len(self._held) <= _MAX_LENGTH and _BEGINNING.match(self._held):
            return []
        self._is_text = True
        held, self._held = self._held, ""
        return [Text(held)]

    def finish(self) -> list[Event]:
        if not self._held:
            return []
        try:
            calls = _calls(self._held.strip())
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            return [Text(self._held)]
        events: list[Event] = []
        for name, arguments in calls:
            events += (Call(name), Arguments(json.dumps(arguments, ensure_ascii=False)))
        return events


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments.

    Raises:
        SyntaxError, TypeError, ValueError: it is no list of calls with literal keyword arguments.
    """
    parsed = ast.parse(text, mode="eval").body
    if not isinstance(parsed, ast.List) or not parsed.elts:
        raise ValueError("no list of calls")
    return [_call(element) for element in parsed.elts]


def _call(element: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(element, ast.Call) or not isinstance(element.func, ast.Name) or element.args:
        raise ValueError("no call with keyword arguments")
    arguments = {}
    for keyword in element.keywords:
        if keyword.arg is None:
            raise ValueError("no keyword argument")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    # What JSON cannot say raises, such as a set, and what an answer cannot, half of a surrogate pair.
    json.dumps(arguments, ensure_ascii=False).encode()
    return element.func.id, arguments
