"""A conversation's messages in the form that a template understands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frontend.chat.arguments import as_object, as_text
from frontend.chat.conversation import Conversation
from frontend.text.template_traits import TemplateTraits
from pagewire.base.errors import InvalidRequest

CONTINUED = "CONTINUED_FROM_HERE "
"""Written behind the content that is to be continued, and found again in the prompt. Its space shows whether
the template trims contents."""


_SHORT_ID = 9


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


def plainer(variables: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A template's variables with messages and tools in forms that give it less and less cause to refuse
    them, if there are any.

    In the first, every turn has a content, calls have ids of nine letters and digits, as Mistral's templates
    demand, and every tool has parameters. In the second, besides, a turn has one call, as Llama 3's demand.
    """
    tools = None if variables["tools"] is None else [_with_parameters(tool) for tool in variables["tools"]]
    messages = [_plainer(message) for message in variables["messages"]]
    before = variables
    for form in (messages, _single_calls(messages)):
        plain = {**variables, "messages": form, "tools": tools}
        if plain != before:
            yield plain
        before = plain


def _with_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """A function without parameters has an empty list of them, for templates that go through it."""
    function = tool["function"]
    if function.get("parameters"):
        return tool
    return {**tool, "function": {**function, "parameters": {"type": "object", "properties": {}}}}


def _message(message: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if value is not None}
    if turn["role"] == "developer" and not traits.knows_developer:
        turn["role"] = "system"
    if "content" in turn:
        turn["content"] = _content(turn["content"], turn["role"], traits)
    elif not traits.knows_calls:
        turn["content"] = ""  # a turn of calls, for a template that has only ever seen text
    if "reasoning_content" in turn:
        reasoning = turn["reasoning_content"]
        turn = {"thinking": reasoning, "reasoning": reasoning, **turn}
    if "tool_calls" in turn:
        turn["tool_calls"] = [_call(call, traits) for call in turn["tool_calls"]]
    return turn


def _content(
    content: str | list[dict[str, Any]], role: str, traits: TemplateTraits
) -> str | list[dict[str, Any]]:
    """Parts for templates that go through them, otherwise one text, the parts on lines of their own. Of the
    templates that take both, all go through the user's parts, and only some through others'."""
    if isinstance(content, str):
        return content if traits.takes_text else [{"type": "text", "text": content}]
    if traits.takes_parts and (role == "user" or not traits.takes_text):
        return [dict(part) for part in content]
    return "\n".join(part["text"] for part in content)


def _call(call: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    function = call["function"]
    read = as_text if traits.takes_argument_text else as_object
    return {**call, "function": {**function, "arguments": read(function["arguments"])}}


def _plainer(turn: dict[str, Any]) -> dict[str, Any]:
    plain = {"content": "", **turn}
    if "tool_calls" in turn:
        plain["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in turn["tool_calls"]]
    if turn["role"] == "tool":
        plain["tool_call_id"] = _short_id(turn.get("tool_call_id", ""))
    return plain


def _single_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a turn for each call, and what it returned right behind it."""
    shown: list[dict[str, Any]] = []
    places: dict[str, int] = {}  # by call id, the place in `shown` of its turn
    for message in messages:
        calls = message.get("tool_calls", ())
        place = places.get(message.get("tool_call_id", "")) if message["role"] == "tool" else None
        if len(calls) > 1:
            places = {call["id"]: len(shown) + index for index, call in enumerate(calls)}
            shown += [
                {**message, "content": "" if index else message["content"], "tool_calls": [call]}
                for index, call in enumerate(calls)
            ]
        elif place is None:
            places = {}
            shown.append(message)
        else:
            shown.insert(place + 1, message)
            places = {name: each + (each > place) for name, each in places.items()}
    return shown


def _short_id(call_id: str) -> str:
    """Nine letters and digits, the same for the same id, which stays if it is such a one."""
    if len(call_id) == _SHORT_ID and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT_ID]


def _marked(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content + CONTINUED
    *before, last = content
    return [*before, {**last, "text": last["text"] + CONTINUED}]
