"""Conversations as OpenAI's API writes them, turned into their protobuf message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2 as pb

Message = Mapping[str, Any]
"""A turn: "role" and "content" (a text, or a list of {"type": "text", "text": ...}), and where they belong
"name", "tool_calls", "tool_call_id" and "reasoning" (or "reasoning_content"). What else an answer's message
has is taken back as long as it says nothing."""

_MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning",
    "reasoning_content",
    "refusal",
    "annotations",
    "cache_control",
    "parsed",
)
_TOOL_KEYS = ("name", "description", "parameters", "strict")
_CHOICES = ("auto", "none", "required")


class ConversationFields(TypedDict, total=False):
    """What goes with messages; the meaning is that of the HTTP fields of the same names.

    tools: functions that the model may call, each {"type": "function", "function": {"name": ...}}.
    tool_choice: "auto", "none", "required" or {"type": "function", "function": {"name": ...}}.
    parallel_tool_calls: whether it may call several at once. chat_template_kwargs: further variables for the
    template. documents: for templates that show them. chat_template: a template instead of the model's own.
    add_generation_prompt, continue_final_message: whether the template opens the assistant's turn, or leaves
    the last one open. include_reasoning: whether what the model thinks is returned.
    """

    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]
    documents: Sequence[Mapping[str, Any]]
    chat_template: str
    add_generation_prompt: bool
    continue_final_message: bool
    include_reasoning: bool


def to_chat_messages(messages: Sequence[Message], **fields: Unpack[ConversationFields]) -> pb.ChatMessages:
    """The message that says the same.

    Raises:
        InvalidRequest: something is not as OpenAI's API has it, or has no place in the message.
    """
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(fields.get("tools") or ())]
    turns = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    variables, documents = fields.get("chat_template_kwargs"), fields.get("documents")
    return pb.ChatMessages(
        messages=turns,
        tools=tools,
        tool_choice=_choice(fields.get("tool_choice")),
        parallel_tool_calls=fields.get("parallel_tool_calls"),
        chat_template_kwargs_json=_json(variables, "chat_template_kwargs"),
        documents_json=_json(documents, "documents"),
        chat_template=fields.get("chat_template"),
        add_generation_prompt=fields.get("add_generation_prompt"),
        continue_final_message=fields.get("continue_final_message"),
        include_reasoning=fields.get("include_reasoning"),
    )


def _message(message: Message, path: str) -> pb.ChatMessage:
    _check_keys(message, _MESSAGE_KEYS, path)
    calls = message.get("tool_calls") or ()
    content = message.get("content")
    if content is None:
        content = _string(message, "refusal", path)
    if content is None and not calls and message.get("role") not in ("assistant", "tool"):
        raise InvalidRequest(
            f"{path} has no content; only the assistant's and the tools' turns need none", param=path
        )
    return pb.ChatMessage(
        role=_string(message, "role", path),
        content=_text(content, path),
        name=_string(message, "name", path),
        tool_calls=[_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)],
        tool_call_id=_string(message, "tool_call_id", path),
        reasoning=_string(message, "reasoning_content", path) or _string(message, "reasoning", path),
    )


def _text(content: Any, path: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = [
        part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        for part in (content if isinstance(content, Sequence) else (None,))
    ]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            f'{path}.content must be a text, or a list of parts {{"type": "text", "text": ...}}',
            param=f"{path}.content",
        )
    return "\n".join(map(str, texts))


def _call(call: Any, path: str) -> pb.ToolCall:
    """A call as a client sends it, or as an answer had it."""
    if isinstance(call, pb.ToolCall):
        return call
    function = _function(call, path)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = _json(arguments, f"{path}.function.arguments")
    return pb.ToolCall(id=_string(call, "id", path), name=function["name"], arguments_json=arguments)


def _tool(tool: Any, path: str) -> pb.Tool:
    function = _function(tool, path)
    _check_keys(function, _TOOL_KEYS, f"{path}.function")
    strict = function.get("strict")
    if strict not in (None, True, False):
        raise InvalidRequest(f"{path}.function.strict is {strict!r}; it must be true or false", param="tools")
    return pb.Tool(
        name=function["name"],
        description=_string(function, "description", f"{path}.function"),
        parameters_json=_json(function.get("parameters"), f"{path}.function.parameters"),
        strict=strict,
    )


def _choice(choice: Any) -> pb.ToolChoice | None:
    if choice is None:
        return None
    if isinstance(choice, str) and choice in _CHOICES:
        return pb.ToolChoice(**{choice: True})  # type: ignore[arg-type]
    if isinstance(choice, str):
        raise InvalidRequest(
            f"tool_choice is {choice!r}; it must be one of {', '.join(_CHOICES)}, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    return pb.ToolChoice(named=_function(choice, "tool_choice")["name"])


def _string(value: Mapping[str, Any], key: str, path: str) -> str | None:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"{path}.{key} is {text!r}; it must be a text", param=f"{path}.{key}")
    return text


def _function(value: Any, path: str) -> Mapping[str, Any]:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            f'{path} must be {{"type": "function", "function": {{"name": ...}}}}',
            param=path.partition("[")[0],
        )
    return function


def _check_keys(value: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    """Refuses what would be lost. Unknown keys that say nothing lose nothing."""
    for key, each in value.items():
        if key not in known and each not in (None, "", [], {}):
            raise InvalidRequest(f"{path}.{key} is not known; known are {', '.join(known)}", param=path)


def _json(value: Any, path: str) -> str | None:
    if value is None:
        return None
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} cannot be written as JSON: {error}", param=path) from error
