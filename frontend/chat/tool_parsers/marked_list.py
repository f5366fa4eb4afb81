"""Calls as a JSON list behind a mark, as IBM's Granite 3, Phi-4-mini and Cohere's models write them:

<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from frontend.chat.grammar import Marks, json_value
from frontend.chat.tool_parsers.call_list import CallList
from frontend.chat.tool_parsers.json_call import State
from frontend.chat.tool_parsers.protocol import Event, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool, calls_schema


class MarkedListParser(ScanningParser):
    """Attributes:
    openings: the marks before a list; the first is the usual one.
    closings: the marks that may follow it; the first is the usual one.
    """

    openings: ClassVar[tuple[str, ...]]
    closings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._in_text
        self._head = ""
        self._list = CallList()

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        opening = cls.openings[0]
        closing = f"SPACE? {marks.mark(cls.closings[0])}" if cls.closings else ""
        return f"""\
text: TEXT
calls: opening SPACE? call_list {closing}
call_list: {json_value(cls._list_schema(tools, parallel=parallel))}
{f"opening: {marks.mark(opening)}" if alone else marks.up_to("opening", opening)}
"""

    @classmethod
    def _list_schema(cls, tools: Sequence[Tool], *, parallel: bool) -> Mapping[str, Any]:
        return calls_schema(tools, "arguments", parallel=parallel, only_strict=True)

    def finish(self) -> list[Event]:
        if self.state == self._in_list:
            unread = self._list.unread
            return [Text(self._head + unread)] if unread.strip(" \t\r\n,]") or self._head else []
        if self.state == self._after_list and self._may_close(self.pending.strip()):
            return []
        return [Text(self.pending)] if self.pending else []

    def _in_text(self, events: list[Event]) -> bool:
        marker = self.take_text(events, self.openings)
        if marker is None:
            return False
        self._head, self._list = marker, CallList()
        self.state = self._in_list
        return True

    def _in_list(self, events: list[Event]) -> bool:
        before = len(events)
        ended = self.read_list(events, self._list)
        if len(events) > before:
            self._head = ""
        if ended:
            self._end_list(events)
        return ended

    def _end_list(self, events: list[Event]) -> None:
        if self._list.state is State.DONE and not self._head:
            self.state = self._after_list
            return
        self.pending = self._list.unread + self.pending
        if self._head:
            events.append(Text(self._head))
        self._head = ""
        self.state = self._in_text

    def _after_list(self, events: list[Event]) -> bool:
        """Behind a list, before the mark that closes it."""
        rest = self.pending.lstrip()
        closing = next((mark for mark in self.closings if rest.startswith(mark)), None)
        if closing is not None:
            self.pending = rest.removeprefix(closing)
        elif self._may_close(rest):
            return False
        self.state = self._in_text
        return True

    def _may_close(self, text: str) -> bool:
        return any(mark.startswith(text) for mark in self.closings)


class GraniteToolParser(MarkedListParser):
    """Granite 3. (Granite 4 calls as Hermes does.)"""

    name = "granite"
    openings = ("<|tool_call|>", "<tool_call>")
    markers = openings

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "<|start_of_role|>" in template and "<|tool_call|>" in template


class Phi4MiniToolParser(MarkedListParser):
    """Phi-4-mini, which at times leaves the mark out and writes functools before the list."""

    name = "phi4_mini"
    openings = ("<|tool_call|>", "functools")
    closings = ("<|/tool_call|>",)
    markers = (openings[0], *closings)

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "<|/tool|>" in template


class CohereToolParser(MarkedListParser):
    """Command R7B, Command A and later, with marks; Command R and R+, with a word and a block of code. A call
    has the keys "tool_name" and "parameters", and at first "tool_call_id"."""

    name = "cohere"
    openings = ("<|START_ACTION|>", "Action: ```json", "Action:```json")
    closings = ("<|END_ACTION|>", "```")
    markers = (openings[0], closings[0])

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "<|START_ACTION|>" in template or ("<|CHATBOT_TOKEN|>" in template and "Action:" in template)

    @classmethod
    def _list_schema(cls, tools: Sequence[Tool], *, parallel: bool) -> Mapping[str, Any]:
        schema = calls_schema(tools, "parameters", parallel=parallel, only_strict=True)
        calls = [
            {
                **call,
                "properties": {
                    "tool_call_id": {"type": "string", "pattern": "[0-9]{1,4}"},
                    "tool_name": call["properties"]["name"],
                    "parameters": call["properties"]["parameters"],
                },
                "required": ["tool_name", "parameters"],
            }
            for call in schema["items"].get("anyOf", [schema["items"]])
        ]
        return {**schema, "items": {"anyOf": calls}}
