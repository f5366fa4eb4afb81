"""Tools in plain text, for models whose chat template has no place for them.

The model is told in the system turn which tools there are and how a call is written. Calls of earlier turns
stand in the assistant's text as it would have written them, and results are turns of the user. The format is
that of Hermes (`frontend.chat.tool_parsers.hermes`), which many models have seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from frontend.chat.tools import Tool

_DESCRIPTION = """\
You can call tools. These are the tools, each with a JSON Schema of its arguments:
<tools>
{tools}
</tools>
To call a tool, write its name and its arguments as JSON, in this form{count}:
<tool_call>
{{"name": "tool name", "arguments": {{"argument": "value"}}}}
</tool_call>
You then get its result in <tool_response></tool_response>. Answer without a call if no tool is needed."""
_SEVERAL = ", once for each call"

Message = dict[str, Any]


def with_tools_described(
    messages: Sequence[Message], tools: Sequence[Tool], *, parallel: bool, in_system_turn: bool
) -> list[Message]:
    """Messages of which the first says what tools there are.

    Args:
        parallel: whether several may be called at once.
        in_system_turn: whether the template shows a turn of the system; otherwise the first of the user says
            it.
    """
    listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    text = _DESCRIPTION.format(tools=listed, count=_SEVERAL if parallel else "")
    if in_system_turn and messages[0]["role"] in ("system", "developer"):
        return [_joined(messages[0], text), *messages[1:]]
    if in_system_turn:
        return [{"role": "system", "content": text}, *messages]
    first = next((index for index, each in enumerate(messages) if each["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": text}, *messages]
    asked = {**messages[first], "content": text}
    return [*messages[:first], _joined(asked, messages[first].get("content")), *messages[first + 1 :]]


def with_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Messages in which earlier calls are part of the assistant's text."""
    turns = []
    for message in messages:
        if message.get("tool_calls"):
            calls = "\n".join(map(_call, message["tool_calls"]))
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            message = _joined(others, calls)
        turns.append(message)
    return turns


def with_results_as_text(messages: Sequence[Message]) -> list[Message]:
    """Messages in which results of calls are turns of the user. Those that follow one another, and what the
    user says behind them, are one turn: many templates want turns to alternate."""
    turns: list[Message] = []
    behind_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            message = {"role": "user", "content": result}
        if behind_result and message["role"] == "user":
            turns[-1] = _joined(turns[-1], message["content"], separator="\n")
        else:
            turns.append(message)
        behind_result = is_result
    return turns


def _call(call: Mapping[str, Any]) -> str:
    """An earlier call as the model is told to write it; arguments that were cut off as they are."""
    function = call["function"]
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>'


def _joined(message: Message, more: str | list[Message] | None, *, separator: str = "\n\n") -> Message:
    """A message with more content behind its own, in parts if either is."""
    content = message.get("content")
    if not content or not more:
        return {**message, "content": content or more or ""}
    if isinstance(content, str) and isinstance(more, str):
        return {**message, "content": content + separator + more}
    return {**message, "content": [*_parts(content), *_parts(more)]}


def _parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(content: str | list[Message] | None) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())
