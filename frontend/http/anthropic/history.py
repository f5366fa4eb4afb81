"""How messages become a conversation's turns, whatever a client has kept in them.

Anthropic puts the results of calls into a user's message, and joins messages of one role that follow each
other; chat templates want a turn for each result, and most want roles to alternate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from frontend.chat.arguments import read_arguments
from frontend.http.anthropic.blocks import (
    ForeignBlock,
    MessageBody,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    joined,
)

_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
"""A line that Claude Code puts before its system prompt. It differs in each request, so that with it no
prompt would be found in the prefix cache; it says nothing to the model."""


def turns_of(
    system: str | Sequence[TextBlock] | None, messages: Sequence[MessageBody]
) -> list[dict[str, Any]]:
    """The turns, as `Conversation` has them.

    Raises:
        Unsupported: a block has something that the model cannot read.
    """
    collected = _Turns()
    if system:
        texts = [system] if isinstance(system, str) else [block.text for block in system]
        collected.say("system", joined([_BILLING.sub("", texts[0], count=1), *texts[1:]]))
    for index, message in enumerate(messages):
        collected.add(message, f"messages[{index}]")
    return collected.whole()


class _Turns:
    """Turns in the making. What they say is kept in pieces, of which there may be tens of thousands."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def whole(self) -> list[dict[str, Any]]:
        """The turns. Those of the assistant have "content", which may be empty, and perhaps
        "reasoning_content" and "tool_calls"."""
        for turn in self._turns:
            if turn["role"] == "assistant":
                # Without anything between them: the second may go on with a sentence of the first.
                turn["content"] = "".join(turn["content"])
                if "reasoning_content" in turn:
                    turn["reasoning_content"] = "".join(turn["reasoning_content"])
            else:
                turn["content"] = joined(turn["content"])
        return self._turns

    def say(self, role: str, text: str) -> None:
        """Adds text of the system or a user, to the last turn if that is of the same role."""
        if not self._turns or self._turns[-1]["role"] != role:
            self._turns.append({"role": role, "content": []})
        self._turns[-1]["content"].append(text)

    def add(self, message: MessageBody, path: str) -> None:
        """Adds a message. Results come before the text that is in the same message."""
        if message.role == "assistant":
            self._assistant()
        num_before = len(self._turns)
        texts = [message.content] if isinstance(message.content, str) else self._add_blocks(message, path)
        if message.role == "assistant":
            self._assistant()["content"] += texts
        elif texts or len(self._turns) == num_before:
            self.say(message.role, joined(texts))

    def _add_blocks(self, message: MessageBody, path: str) -> list[str]:
        """Adds what is not the message's own text, which is returned."""
        assert not isinstance(message.content, str)
        texts: list[str] = []
        for index, block in enumerate(message.content or ()):
            at = f"{path}.content[{index}]"
            match block:
                case ForeignBlock():
                    pass
                case ThinkingBlock():
                    self._assistant().setdefault("reasoning_content", []).append(block.thinking)
                case ToolUseBlock():
                    self._add_call(block)
                case ToolResultBlock():
                    self._add_result(block, at)
                case _:
                    texts.append(block.to_text(at))
        return texts

    def _assistant(self) -> dict[str, Any]:
        """The last turn, if it is the assistant's, or a new one."""
        if not self._turns or self._turns[-1]["role"] != "assistant":
            self._turns.append({"role": "assistant", "content": []})
        return self._turns[-1]

    def _add_call(self, block: ToolUseBlock) -> None:
        self._names[block.id] = block.name
        function = {"name": block.name, "arguments": read_arguments(block.input)}
        call = {"id": block.id, "type": "function", "function": function}
        self._assistant().setdefault("tool_calls", []).append(call)

    def _add_result(self, block: ToolResultBlock, path: str) -> None:
        """The call may be missing, where a client has dropped the beginning of the conversation."""
        turn = {"role": "tool", "tool_call_id": block.tool_use_id, "content": [block.to_text(path)]}
        if block.tool_use_id in self._names:
            turn["name"] = self._names[block.tool_use_id]
        self._turns.append(turn)
