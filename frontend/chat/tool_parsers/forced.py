"""Replies that a grammar holds to be calls, because the request's choice of tools demands them.

They have the form that `frontend.chat.tools.forced_calls` asks for.
"""

from __future__ import annotations

from frontend.chat.tool_parsers.call_list import CallList
from frontend.chat.tool_parsers.json_call import State
from frontend.chat.tool_parsers.protocol import Arguments, Call, Event, Text, ToolParser


class NamedCallParser(ToolParser):
    """The whole reply is the arguments of the one function."""

    name = "named"

    def __init__(self, tool_name: str) -> None:
        super().__init__((tool_name,))
        self._tool_name = tool_name
        self._begun = False

    def push(self, text: str) -> list[Event]:
        if self._begun:
            return [Arguments(text)]
        text = text.lstrip()
        if not text:
            return []
        self._begun = True
        return [Call(self._tool_name), Arguments(text)]

    def finish(self) -> list[Event]:
        return []


class FramedParser(ToolParser):
    """Reads what one parser says is the answer with another one."""

    name = "framed"

    def __init__(self, frame: ToolParser, inner: ToolParser) -> None:
        super().__init__(())
        self._frame = frame
        self._inner = inner

    def push(self, text: str) -> list[Event]:
        return self._through(self._frame.push(text))

    def finish(self) -> list[Event]:
        return [*self._through(self._frame.finish()), *self._inner.finish()]

    def _through(self, events: list[Event]) -> list[Event]:
        read: list[Event] = []
        for event in events:
            read += self._inner.push(event.text) if isinstance(event, Text) else [event]
        return read


class RequiredCallsParser(ToolParser):
    """The whole reply is a list of calls."""

    name = "required"

    def __init__(self) -> None:
        super().__init__(())
        self._list = CallList()
        self._ended = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        index = 0
        while index < len(text):
            if self._ended:
                return [*events, Text(text[index:])]
            end = self._list.plain_until(text, index)
            if end > index:
                events.append(Arguments(text[index:end]))
                index = end
                continue
            events += self._list.push(text[index])
            index += 1
            self._ended = self._list.state is not State.READING
            if self._list.state is State.BROKEN:
                events.append(Text(self._list.unread))
        return events

    def finish(self) -> list[Event]:
        rest = "" if self._ended else self._list.unread
        return [Text(rest)] if rest.strip(" \t\r\n,]") else []
