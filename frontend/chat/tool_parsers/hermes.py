"""Calls in JSON between tags, as Hermes, Qwen 2.5 and Qwen 3 write them:

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value
from frontend.chat.tool_parsers.json_call import JsonCall, State
from frontend.chat.tool_parsers.protocol import Event, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool, call_schema

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesToolParser(ScanningParser):
    """What does not belong between a call and its closing tag (mostly one brace too many) is dropped."""

    name = "hermes"
    markers = (_OPEN, _CLOSE)

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._in_text
        self._call = JsonCall()
        self._before_close = ""

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return _OPEN in template and "arguments" in template and "<function=" not in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        more = f"({marks.mark(_OPEN)} call)*" if parallel else ""
        return f"""\
text: TEXT
calls: opening call {more}
call: SPACE? call_object SPACE? {marks.mark(_CLOSE)} SPACE?
call_object: {json_value(call_schema(tools, "arguments", only_strict=True))}
{f"opening: {marks.mark(_OPEN)}" if alone else marks.up_to("opening", _OPEN)}
"""

    def finish(self) -> list[Event]:
        if self.state == self._in_call:
            return [] if self._call.begun else [Text(_OPEN + self._call.raw)]
        rest = self._before_close + self.pending
        unclosed = self.state == self._after_call and _CLOSE.startswith(rest.strip())
        return [Text(rest)] if rest and not unclosed else []

    def _in_text(self, events: list[Event]) -> bool:
        if self.take_text(events, (_OPEN,)) is None:
            return False
        self._begin_call()
        return True

    def _begin_call(self) -> None:
        self._call = JsonCall()
        self.state = self._in_call

    def _in_call(self, events: list[Event]) -> bool:
        if not self.read_call(events, self._call):
            return False
        if self._call.begun or self._call.state is State.DONE:
            self._before_close = ""
            self.state = self._after_call
        else:
            events.append(Text(_OPEN))
            self.pending = self._call.raw[:-1] + self.pending
            self.state = self._in_text
        return True

    def _after_call(self, events: list[Event]) -> bool:
        dropped: list[Event] = []
        marker = self.take_text(dropped, (_OPEN, _CLOSE))
        self._before_close += "".join(event.text for event in dropped if isinstance(event, Text))
        if marker is None:
            return False
        self._before_close = ""
        if marker == _OPEN:
            self._begin_call()
        else:
            self.state = self._in_text
        return True
