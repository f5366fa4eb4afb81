"""What a client says in a conversation, in the one form that both protocols turn it into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frontend.chat.tools import Tool, ToolChoice, check_choice
from pagewire.base.errors import InvalidRequest

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Chat messages for the model's template, each a mapping with "role" and whatever belongs to it.

    Attributes:
        messages: "content" is a text, a list of parts {"type": "text", "text": ...}, or absent; "tool_calls"
            have their arguments as `read_arguments` returns them; "reasoning_content" is what an earlier turn
            thought.
        add_generation_prompt: whether the template opens the assistant's turn.
        continue_final_message: whether the last turn is left open, for the model to go on with.
        chat_template: a Jinja template instead of the model's own.
        template_variables: further variables for the template.
        documents: what the template may show the model to answer from.
        tools: functions that the model may call.
        tool_choice: whether it may or must.
        parallel_tool_calls: whether it may call several at once.
        include_reasoning: whether the client is to see what the model thought before it answered.

    Raises:
        InvalidRequest: there is no message, there are too many, one has an unknown role, or the rest
            contradicts itself.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"messages has {len(self.messages)} entries; it must have 1 to {MAX_MESSAGES}",
                param="messages",
            )
        for index, message in enumerate(self.messages):
            if message["role"] not in ROLES:
                raise InvalidRequest(
                    f"messages[{index}].role is {message['role']!r}; it must be one of {', '.join(ROLES)}",
                    param=f"messages[{index}].role",
                )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "continue_final_message goes on with the last turn, add_generation_prompt opens another; "
                "set one of them",
                param="continue_final_message",
            )
        check_choice(self.tools, self.tool_choice)


def effort_variables(effort: str | None) -> dict[str, Any]:
    """The template variables for how much the model is to think. Templates that can be told call it
    `reasoning_effort`; others can only be told not to think at all, by one of two names. A template takes no
    notice of variables that it does not know."""
    if effort is None:
        return {}
    silent = {"enable_thinking": False, "thinking": False} if effort == "none" else {}
    return {"reasoning_effort": effort, **silent}
