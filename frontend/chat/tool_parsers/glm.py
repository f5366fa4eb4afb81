"""Turns that begin with a line for the name of a tool, as ChatGLM3 and GLM-4 write them:

get_weather
```python
tool_call(city='Paris')
```

GLM-4 writes the arguments as JSON instead. The line of an ordinary answer is empty.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Sequence

from frontend.chat.grammar import Marks, json_value, literal
from frontend.chat.tool_parsers.json_call import JsonValue
from frontend.chat.tool_parsers.protocol import Arguments, Call, Event, Text
from frontend.chat.tool_parsers.scanning import ScanningParser
from frontend.chat.tools import Tool

_NEXT_TURN = "<|assistant|>"
_FENCE = "```"
_MAX_CODE = 256 * 1024


class ChatGlm3ToolParser(ScanningParser):
    """Reads both forms. It reads every reply, because an answer begins with white space that is no part of
    it."""

    name = "chatglm3"
    markers = (_NEXT_TURN,)
    reads_all = True

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names)
        self.state = self._at_name
        self._head = ""
        self._name = ""
        self._arguments = JsonValue()

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "[gMASK]sop" in template or ("[gMASK]" in template and "tool_call(" in template)

    def finish(self) -> list[Event]:
        if self.state == self._in_code:
            return self._read_code(self.pending)
        if self.state == self._in_arguments or self.state == self._behind_call:
            return []
        rest = self._head + self.pending
        if self.state == self._at_name:
            rest = rest.lstrip()
        return [Text(rest)] if rest else []

    def _at_name(self, events: list[Event]) -> bool:
        """In the first line of a turn."""
        line, newline, rest = self.pending.partition("\n")
        name = line.strip()
        if newline and not name:
            self.pending, self.state = rest, self._before_text
        elif newline and name in self.tool_names:
            self._head, self._name = line + newline, name
            self.pending, self.state = rest, self._before_arguments
        elif newline or not any(tool.startswith(name) for tool in ("", *self.tool_names)):
            self.state = self._in_text
        else:
            return False
        return True

    def _before_text(self, events: list[Event]) -> bool:
        self.take_spaces()
        if self.pending:
            self.state = self._in_text
        return bool(self.pending)

    def _in_text(self, events: list[Event]) -> bool:
        marker = self.take_text(events, (_NEXT_TURN,))
        if marker is None:
            return False
        self.state = self._at_name
        return True

    def _before_arguments(self, events: list[Event]) -> bool:
        self._head += self.take_spaces()
        if not self.pending:
            return False
        if self.pending[0] == "{":
            events.append(Call(self._name))
            self._head, self._arguments = "", JsonValue()
            self.state = self._in_arguments
        elif self.pending.startswith(_FENCE):
            self.state = self._in_code
        elif _FENCE.startswith(self.pending):
            return False
        else:
            events.append(Text(self._head))
            self._head = ""
            self.state = self._in_text
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        if not self.read_arguments(events, self._arguments):
            return False
        self.state = self._behind_call
        return True

    def _in_code(self, events: list[Event]) -> bool:
        """Up to the end of a block of code, which is known as a whole only."""
        end = self.pending.find("\n" + _FENCE, len(_FENCE))
        if end < 0 and len(self.pending) <= _MAX_CODE:
            return False
        code = self.take(len(self.pending) if end < 0 else end + 1 + len(_FENCE))
        events += self._read_code(code)
        return True

    def _read_code(self, code: str) -> list[Event]:
        """A call, or if the code is none the text that it is."""
        head, self._head = self._head, ""
        try:
            arguments = _arguments_of(code)
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            self.state = self._in_text
            return [Text(head + code)]
        self.state = self._behind_call
        return [Call(self._name), Arguments(arguments)]

    def _behind_call(self, events: list[Event]) -> bool:
        """What stands between a call and the next turn is dropped."""
        dropped: list[Event] = []
        marker = self.take_text(dropped, (_NEXT_TURN,))
        if marker is None:
            return False
        self.state = self._at_name
        return True


class Glm4ToolParser(ChatGlm3ToolParser):
    """GLM-4, whose calls can be held to a schema."""

    name = "glm4"

    @classmethod
    def recognizes(cls, template: str) -> bool:
        return "[gMASK]<sop>" in template and "<|observation|>" in template and "<arg_key>" not in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str:
        more = f"({marks.mark(_NEXT_TURN)} call)*" if parallel else ""
        calls = " | ".join(f"{literal(tool.name)} NEWLINE {json_value(tool.enforced)}" for tool in tools)
        before = "" if alone else f"(NEWLINE TEXT {marks.mark(_NEXT_TURN)})?"
        return f"""\
text: NEWLINE TEXT
calls: {before} call {more}
call: {calls}
NEWLINE: /\\n/
"""


def _arguments_of(code: str) -> str:
    """The keyword arguments of a call in a block of code, as JSON.

    Raises:
        SyntaxError, TypeError, ValueError: it is no call with literal keyword arguments.
    """
    _, _, body = code.partition("\n")
    parsed = ast.parse(body.removesuffix(_FENCE).strip(), mode="eval").body
    if not isinstance(parsed, ast.Call) or parsed.args:
        raise ValueError("no call with keyword arguments")
    arguments = {}
    for keyword in parsed.keywords:
        if keyword.arg is None:
            raise ValueError("no keyword argument")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    text = json.dumps(arguments, ensure_ascii=False)
    text.encode()  # which half of a surrogate pair cannot be
    return text
