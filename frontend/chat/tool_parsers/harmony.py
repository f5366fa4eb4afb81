"""Messages on channels, as gpt-oss writes them:

<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>It rains.

What is on the channel analysis are thoughts. A call is a message to a function:

<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value, literal
from frontend.chat.tool_parsers.protocol import Arguments, Call, Event, Reasoning, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_HEADS = (_CHANNEL, _START, " to=")
_TO_FUNCTION = re.compile(r"to=functions\.([\w.-]+)")
_LONGEST_HEADER = 512


class HarmonyToolParser(ScanningParser):
    """It reads every reply: calls, thoughts and the answer are told apart by the headers of messages."""

    name = "harmony"
    markers = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN)
    reads_all = True

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._at_message
        self._kind: type[Text] | type[Reasoning] | type[Arguments] = Text
        self._has_arguments = False

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return _CHANNEL in template and _MESSAGE in template

    @classmethod
    def frame(cls, marks: Marks) -> tuple[str, str]:
        return "analysis? final", _frame_rules(marks)

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        named = " | ".join(
            f"{literal(tool.name)} SPACE? {marks.mark(_CONSTRAIN)} JSON_WORD {marks.mark(_MESSAGE)} "
            f"{json_value(tool.enforced)}"
            for tool in tools
        )
        channel, message = marks.mark(_CHANNEL), marks.mark(_MESSAGE)
        preamble = "" if alone else "preamble?"
        return f"""\
text: analysis? final TEXT
calls: analysis? {preamble} {channel} "commentary to=functions." named
named: {named}
preamble: {channel} "commentary" {message} preamble_text {marks.mark(_START)} "assistant"
{marks.up_to("preamble_text", _END)}
JSON_WORD: "json"
{_frame_rules(marks)}"""

    def finish(self) -> list[Event]:
        if self.state == self._in_message:
            return self._end_message() if not self.pending else [self._kind(self.pending)]
        return [Text(self.pending)] if self.pending and not self._is_head(self.pending) else []

    def _is_head(self, text: str) -> bool:
        return any(text.startswith(head) or head.startswith(text) for head in _HEADS)

    def _at_message(self, events: list[Event]) -> bool:
        """Where a header begins, or a text that has none."""
        if any(self.pending.startswith(head) for head in _HEADS):
            self.state = self._in_header
        elif self._is_head(self.pending):
            return False
        else:
            self._kind = Text
            self.state = self._in_message
        return True

    def _in_header(self, events: list[Event]) -> bool:
        header, marker, rest = self.pending.partition(_MESSAGE)
        if not marker:
            if len(header) > _LONGEST_HEADER:
                self._kind = Text
                self.state = self._in_message
                return True
            return False
        self.pending = rest
        function = _TO_FUNCTION.search(header)
        if function is not None:
            events.append(Call(function[1]))
            self._kind, self._has_arguments = Arguments, False
        else:
            self._kind = Reasoning if f"{_CHANNEL}analysis" in header else Text
        self.state = self._in_message
        return True

    def _in_message(self, events: list[Event]) -> bool:
        found: list[Event] = []
        marker = self.take_text(found, (_END, _CALL, _RETURN, _START, _CHANNEL))
        for event in found:
            assert isinstance(event, Text)
            events.append(self._kind(event.text))
            self._has_arguments = True
        if marker is None:
            return False
        events += self._end_message()
        if marker in (_START, _CHANNEL):
            self.pending = marker + self.pending
        self.state = self._at_message
        return True

    def _end_message(self) -> list[Event]:
        """A call without arguments has an empty object of them."""
        return [Arguments("{}")] if self._kind is Arguments and not self._has_arguments else []


def _frame_rules(marks: Marks) -> str:
    channel, message = marks.mark(_CHANNEL), marks.mark(_MESSAGE)
    return f"""\
analysis: {channel} "analysis" {message} analysis_text {marks.mark(_START)} "assistant"
{marks.up_to("analysis_text", _END)}
final: {channel} "final" {message}
"""
