"""Reads a model's reply as a message: content, reasoning, calls of tools."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.chat.reasoning import ReasoningSplitter
from frontend.chat.tool_parsers.protocol import (
    Arguments,
    Call,
    Event,
    Reasoning,
    Text,
    ToolParser,
)
from frontend.generation.message_parser import MessagePart, ToolCallDelta


class ReplyParser:
    """A `MessageParser`: first the thoughts are split off, then calls are found in the rest.

    White space at the end of the content is passed on once more content follows, or at the end of a reply
    without calls: where it only sets a call off from the content it is dropped.
    """

    def __init__(
        self,
        *,
        reasoning: ReasoningSplitter | None,
        tools: ToolParser | None,
        parallel: bool = True,
        include_reasoning: bool = True,
    ) -> None:
        """Args:
        parallel: whether calls after the first are returned.
        include_reasoning: whether thoughts are returned.
        """
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel
        self._include_reasoning = include_reasoning
        self._spaces = ""
        self._num_calls = 0

    def push(self, text: str, *, last: bool) -> MessagePart:
        """See `MessageParser.push`."""
        thoughts, answer = self._split(text, last)
        if self._tools is None:
            return MessagePart(content=answer, reasoning=thoughts)
        events = self._tools.push(answer) if answer else []
        if last:
            events += self._tools.finish()
        if self._include_reasoning:
            thoughts += "".join(event.text for event in events if isinstance(event, Reasoning))
        content, calls = self._number(events)
        if last and self._num_calls == 0:
            content += self._spaces
        return MessagePart(content=content, reasoning=thoughts, tool_calls=tuple(calls))

    def _split(self, text: str, last: bool) -> tuple[str, str]:
        if self._reasoning is None:
            return "", text
        thoughts, answer = self._reasoning.push(text)
        if last:
            more_thoughts, more_answer = self._reasoning.finish()
            thoughts, answer = thoughts + more_thoughts, answer + more_answer
        return thoughts if self._include_reasoning else "", answer

    def _number(self, events: Sequence[Event]) -> tuple[str, list[ToolCallDelta]]:
        """Joins a piece's text and, call by call, its arguments."""
        content: list[str] = []
        calls: list[_Growing] = []
        for event in events:
            match event:
                case Text(text):
                    content.append(self._without_end(text))
                case Call(name, call_id):
                    self._spaces = ""
                    assert self._tools is not None
                    calls.append(_Growing(self._num_calls, call_id or self._tools.new_id(), name))
                    self._num_calls += 1
                case Arguments(json):
                    if not calls:
                        calls.append(_Growing(self._num_calls - 1))
                    calls[-1].arguments.append(json)
        wanted = calls if self._parallel else [call for call in calls if call.index == 0]
        return "".join(content), [call.delta() for call in wanted]

    def _without_end(self, text: str) -> str:
        """Text that may be shown now: what was held back and this, without the white space at its end."""
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        return shown


class _Growing:
    """A delta of one call while its arguments are put together."""

    def __init__(self, index: int, call_id: str = "", name: str = "") -> None:
        self.index = index
        self.arguments: list[str] = []
        self._id = call_id
        self._name = name

    def delta(self) -> ToolCallDelta:
        return ToolCallDelta(self.index, self._id, self._name, "".join(self.arguments))
