"""A conversation's messages in the form that a template understands."""

from __future__ import annotations

import json
from typing import Any

from frontend.chat.conversation import Conversation
from frontend.text.template_traits import TemplateTraits
from pagewire.base.errors import InvalidRequest

CONTINUED = "CONTINUED_FROM_HERE "
"""Written behind the content that is to be continued, and found again in the prompt. Its space shows whether
the template trims contents."""


def messages_for(conversation: Conversation, traits: TemplateTraits) -> list[dict[str, Any]]:
    """The messages as transformers would hand them to the template: without what is null, reasoning under
    each of its names, arguments as objects; and in the forms that this template takes.

    Raises:
        InvalidRequest: the last message has no text to continue.
    """
    messages = [_message(message, traits) for message in conversation.messages]
    if conversation.continue_final_message:
        if not conversation.messages[-1].get("content"):
            raise InvalidRequest(
                "continue_final_message is set, but the last message has no content to continue",
                param="continue_final_message",
            )
        messages[-1]["content"] = _marked(messages[-1]["content"])
    return messages


def _message(message: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if value is not None}
    if turn["role"] == "developer" and not traits.knows_developer:
        turn["role"] = "system"
    if "content" in turn:
        turn["content"] = _content(turn["content"], traits)
    elif not traits.knows_calls:
        turn["content"] = ""  # a turn of calls, for a template that has only ever seen text
    if "reasoning_content" in turn:
        reasoning = turn["reasoning_content"]
        turn = {"thinking": reasoning, "reasoning": reasoning, **turn}
    if "tool_calls" in turn and traits.takes_argument_text:
        turn["tool_calls"] = [_with_argument_text(call) for call in turn["tool_calls"]]
    return turn


def _content(content: str | list[dict[str, Any]], traits: TemplateTraits) -> str | list[dict[str, Any]]:
    """Parts for templates that go through them, otherwise one text, the parts on lines of their own."""
    if isinstance(content, str):
        return content if traits.takes_text else [{"type": "text", "text": content}]
    if traits.takes_parts:
        return [dict(part) for part in content]
    return "\n".join(part["text"] for part in content)


def _with_argument_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _marked(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content + CONTINUED
    *before, last = content
    return [*before, {**last, "text": last["text"] + CONTINUED}]
