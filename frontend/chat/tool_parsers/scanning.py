"""What parsers of marked formats have in common: they go from state to state over text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from frontend.chat.marker_search import split_at_marker
from frontend.chat.tool_parsers.call_list import CallList
from frontend.chat.tool_parsers.json_call import JsonCall, JsonValue, State
from frontend.chat.tool_parsers.protocol import Arguments, Event, Text, ToolParser


class ScanningParser(ToolParser):
    """A parser as a state machine.

    A state is a method that takes what it can from the front of `pending`, appends events, perhaps names the
    next state in `state`, and says whether it got anywhere; if it did not, it waits for more text.
    """

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.pending = ""
        self.state: Callable[[list[Event]], bool]

    def push(self, text: str) -> list[Event]:
        self.pending += text
        events: list[Event] = []
        while self.pending and self.state(events):
            pass
        return events

    def take(self, count: int) -> str:
        """Removes characters from the front of `pending`."""
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken

    def take_spaces(self) -> str:
        """Removes white space from the front of `pending`."""
        return self.take(len(self.pending) - len(self.pending.lstrip()))

    def take_text(self, events: list[Event], markers: Sequence[str]) -> str | None:
        """Passes text on up to a marker and returns the marker that it took, if any. What may be the
        beginning of a marker is left."""
        text, marker, rest = split_at_marker(self.pending, markers)
        self.pending = rest
        if text:
            events.append(Text(text))
        return marker

    def read_call(self, events: list[Event], call: JsonCall) -> bool:
        """Passes characters to a call until it is complete or broken, and says whether it is either. The
        character that broke it is left in `pending`."""
        index = 0
        while index < len(self.pending):
            end = call.plain_until(self.pending, index)
            if end > index:
                events.append(Arguments(self.pending[index:end]))
                index = end
                continue
            events += call.push(self.pending[index])
            if call.state is not State.READING:
                self.take(index if call.state is State.BROKEN else index + 1)
                return True
            index += 1
        self.pending = ""
        return False

    def read_arguments(self, events: list[Event], arguments: JsonValue) -> bool:
        """Passes characters to the arguments of a call until they are complete, and says whether they are."""
        index = 0
        while index < len(self.pending) and not arguments.done:
            end = arguments.plain_until(self.pending, index)
            if end == index:
                arguments.push(self.pending[index])
                end += 1
            events.append(Arguments(self.pending[index:end]))
            index = end
        self.take(index)
        return arguments.done

    def read_list(self, events: list[Event], calls: CallList) -> bool:
        """Passes characters to a list of calls until it is complete or broken, and says whether it is
        either."""
        index = 0
        while index < len(self.pending):
            end = calls.plain_until(self.pending, index)
            if end > index:
                events.append(Arguments(self.pending[index:end]))
                index = end
                continue
            events += calls.push(self.pending[index])
            index += 1
            if calls.state is not State.READING:
                self.take(index)
                return True
        self.pending = ""
        return False
