"""Calls as steps of ReAct (arXiv:2210.03629), as Qwen's first version was trained to write them:

Thought: I have to look at the weather.
Action: get_weather
Action Input: {"city": "Paris"}
Observation:

What follows Observation is the result, so the reply ends before it. An answer stands behind "Final Answer:".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value, literal
from frontend.chat.tool_parsers.json_call import JsonValue
from frontend.chat.tool_parsers.protocol import Call, Event, Reasoning, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool

_THOUGHT, _ACTION, _INPUT, _ANSWER = "Thought:", "Action:", "Action Input:", "Final Answer:"
_BEFORE_INPUT = f"\n{_INPUT} "
_STEP = re.compile(r"(?:\A|\n)[ \t]*(Action|Final Answer):")
_LONGEST_STEP = 32
"""Of a beginning of _STEP that more text may complete, in characters."""
_HEAD = re.compile(r"[ \t]*([^\n]*?)[ \t]*\n\s*Action Input:\s*")


class ReactToolParser(ScanningParser):
    """Keeps the thought until it is known what follows it: a call, whose text it is, or an answer."""

    name = "react"
    stops = ("Observation:",)

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._in_thought
        self._looked_at = 0
        self._step_end = 0
        self._arguments = JsonValue()

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return _INPUT in template and _ANSWER in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        calls = " | ".join(
            f"{literal(' ' + tool.name)} {literal(_BEFORE_INPUT)} {json_value(tool.enforced)}"
            for tool in tools
        )
        thought = f"thought: {literal(_ACTION)}"
        if not alone:  # up to the first line that begins so
            thought = rf"thought[lazy]: /((?s:.*)\n)?[ \t]*{_ACTION}/"
        return f"""\
text: TEXT
calls: thought call
call: {calls}
{thought}
"""

    def finish(self) -> list[Event]:
        if self.state not in (self._in_thought, self._at_action) or not self.pending:
            return []
        return [Text(self.pending)]

    def _in_thought(self, events: list[Event]) -> bool:
        found = _STEP.search(self.pending, self._looked_at)
        if found is None:
            # A step begins with its line, which may be cut anywhere.
            self._looked_at = max(0, len(self.pending) - _LONGEST_STEP)
            return False
        self._step_end = found.end()
        if found[1] == "Action":
            self._looked_at = found.start()
            self.state = self._at_action
            return True
        thought = _without_mark(self.pending[: found.start()])
        if thought:
            events.append(Reasoning(thought))
        self.take(self._step_end)
        self.state = self._before_answer
        return True

    def _at_action(self, events: list[Event]) -> bool:
        """Behind "Action:". What does not become a call of a tool that there is remains a thought."""
        head = _HEAD.match(self.pending, self._step_end)
        name, newline, rest = self.pending[self._step_end :].partition("\n")
        if head is None or head.end() == len(self.pending):
            name, rest = name.strip(), rest.lstrip()
            known = name in self.tool_names if newline else self._may_become_name(name)
            if known and (_INPUT.startswith(rest) or rest.startswith(_INPUT)):
                return False
        elif head[1] in self.tool_names and self.pending[head.end()] == "{":
            thought = _without_mark(self.pending[: self._looked_at])
            if thought:
                events.append(Text(thought))
            events.append(Call(head[1]))
            self.take(head.end())
            self.state = self._in_arguments
            return True
        self._looked_at = self._step_end
        self.state = self._in_thought
        return True

    def _may_become_name(self, beginning: str) -> bool:
        return any(name.startswith(beginning) for name in self.tool_names)

    def _in_arguments(self, events: list[Event]) -> bool:
        if not self.read_arguments(events, self._arguments):
            return False
        self.state = self._behind_call
        return True

    def _behind_call(self, events: list[Event]) -> bool:
        """What the model imagines to be the result is dropped."""
        self.pending = ""
        return True

    def _before_answer(self, events: list[Event]) -> bool:
        self.take_spaces()
        if self.pending:
            self.state = self._in_answer
        return bool(self.pending)

    def _in_answer(self, events: list[Event]) -> bool:
        events.append(Text(self.take(len(self.pending))))
        return True


def _without_mark(thought: str) -> str:
    return thought.strip().removeprefix(_THOUGHT).strip()
