"""Calls in JSON without tags, as Llama 3.1 and later write them:

{"name": "get_weather", "parameters": {"city": "Paris"}}

Several are separated by semicolons; <|python_tag|> may come before the first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value
from frontend.chat.tool_parsers.json_call import JsonCall
from frontend.chat.tool_parsers.protocol import Event, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool, call_schema

_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ScanningParser):
    """Only an object at the beginning of a reply (or behind the tag) that names a known function and has
    arguments is a call; any other is text."""

    name = "llama3_json"
    markers = (_TAG,)

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._at_start
        self._before = ""
        self._call = JsonCall(only=self.tool_names)

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return _TAG in template or ("<|start_header_id|>" in template and "parameters" in template)

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        more = '(";" SPACE? call)*' if parallel else ""
        return f"""\
text: /\\s*[^\\s{{](?s:.*)/
calls: SPACE? {marks.mark(_TAG)}? call {more}
call: {json_value(call_schema(tools, "parameters", only_strict=True))}
"""

    def finish(self) -> list[Event]:
        if self.state == self._in_call:
            rest = "" if self._call.begun else self._before + self._call.raw
        elif self.state == self._after_call:
            rest = self.pending.strip().removeprefix(";").lstrip()
        else:
            rest = self._before + self.pending
        return [Text(rest)] if rest else []

    def _at_start(self, events: list[Event]) -> bool:
        """Before the first character that is no white space."""
        self._before += self.take_spaces()
        if not self.pending:
            return False
        if self.pending[0] == "{":
            self.state = self._in_call
        else:
            self._leave_as_text(events, self._before)
        return True

    def _in_text(self, events: list[Event]) -> bool:
        marker = self.take_text(events, (_TAG,))
        if marker is None:
            return False
        self._begin_call(marker)
        return True

    def _begin_call(self, before: str) -> None:
        self._before = before
        self._call = JsonCall(only=self.tool_names)
        self.state = self._in_call

    def _in_call(self, events: list[Event]) -> bool:
        if not self.read_call(events, self._call):
            return False
        if self._call.begun:
            self.state = self._after_call
        else:
            self.pending = self._call.raw[:-1] + self.pending
            self._leave_as_text(events, self._before)
        return True

    def _leave_as_text(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Text(text))
        self._before = ""
        self.state = self._in_text

    def _after_call(self, events: list[Event]) -> bool:
        """Waits for what follows a call: another, or text."""
        rest = self.pending.lstrip()
        separator = rest[:1] if rest[:1] == ";" else ""
        rest = rest[len(separator) :].lstrip()
        if rest.startswith("{"):
            before, self.pending = self.pending[: -len(rest)], rest
            self._begin_call(before)
        elif rest.startswith(_TAG):
            self.pending = rest.removeprefix(_TAG)
            self._begin_call(_TAG)
        elif not _TAG.startswith(rest):
            self.state = self._in_text
        else:
            return False
        return True
