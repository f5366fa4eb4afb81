"""Calls behind a control token, as Mistral's models write them. The older ones a list,

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]

the newer ones one by one, some with an id:

[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]a1b2c3d4e[ARGS]{}
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value, literal
from frontend.chat.marker_search import split_at_marker
from frontend.chat.tool_parsers.call_list import CallList
from frontend.chat.tool_parsers.json_call import JsonValue, State
from frontend.chat.tool_parsers.protocol import Call, Event, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool, calls_schema

_CALLS, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"(?P<name>[\w.-]+)\s*(\[CALL_ID\]\s*(?P<id>[\w-]+)\s*)?(\[ARGS\]\s*)?")
_LONGEST_HEAD = 512


class MistralToolParser(ScanningParser):
    """Reads both forms."""

    name = "mistral"
    markers = (_CALLS, _ARGS, _ID)

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._in_text
        self._head = ""
        self._list = CallList()
        self._arguments = JsonValue()

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return _CALLS in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        array = calls_schema(tools, "arguments", parallel=parallel, only_strict=True)
        separator = f"{marks.mark(_ARGS)}?"
        named = " | ".join(f"{literal(tool.name)} {separator} {json_value(tool.enforced)}" for tool in tools)
        return f"""\
text: TEXT
calls: opening SPACE? ({json_value(array)} | named {f"({marks.mark(_CALLS)} named)*" if parallel else ""})
named: {named}
{f"opening: {marks.mark(_CALLS)}" if alone else marks.up_to("opening", _CALLS)}
"""

    @staticmethod
    def new_id() -> str:
        """Nine letters and digits: the templates of these models refuse any other."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def finish(self) -> list[Event]:
        if self.state == self._in_list:
            rest = self._head + self._list.unread
            return [Text(rest)] if self._list.unread.strip(" \t\r\n,]") else []
        if self.state == self._in_arguments:
            return []
        rest = self._head + self.pending
        return [Text(rest)] if rest else []

    def _in_text(self, events: list[Event]) -> bool:
        marker = self.take_text(events, (_CALLS,))
        if marker is None:
            return False
        self._head = marker
        self.state = self._at_head
        return True

    def _at_head(self, events: list[Event]) -> bool:
        """Behind the token: a list, or a name."""
        self._head += self.take_spaces()
        if not self.pending:
            return False
        self._list = CallList()
        self.state = self._in_list if self.pending[0] == "[" else self._in_name
        return True

    def _in_list(self, events: list[Event]) -> bool:
        before = len(events)
        ended = self.read_list(events, self._list)
        if len(events) > before or self._list.state is State.DONE:
            self._head = ""
        if self._list.state is State.BROKEN:
            self.pending = self._list.unread + self.pending
            self._leave_as_text(events)
        elif ended:
            self.state = self._in_text
        return ended

    def _in_name(self, events: list[Event]) -> bool:
        """Up to the arguments. What comes before them is short, or it is no name."""
        head, marker, _ = split_at_marker(self.pending, ("{", _CALLS))
        if marker is None and len(head) <= _LONGEST_HEAD:
            return False
        named = _HEAD.fullmatch(head) if len(head) <= _LONGEST_HEAD and marker == "{" else None
        if named is None:
            self._leave_as_text(events)
            return True
        self.take(len(head))
        self._head = ""
        events.append(Call(named["name"], named["id"] or ""))
        self._arguments = JsonValue()
        self.state = self._in_arguments
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        if not self.read_arguments(events, self._arguments):
            return False
        self.state = self._in_text
        return True

    def _leave_as_text(self, events: list[Event]) -> None:
        if self._head:
            events.append(Text(self._head))
        self._head = ""
        self.state = self._in_text
