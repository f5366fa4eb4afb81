"""Conversations of the public gRPC API in the pipeline's form."""

from __future__ import annotations

import json
from typing import Any

from frontend.chat.arguments import read_arguments
from frontend.chat.conversation import MAX_MESSAGES, Conversation
from frontend.chat.tools import MAX_TOOLS, Tool, ToolChoice
from frontend.generation.request import require_at_most
from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2 as pb


def read_conversation(given: pb.ChatMessages) -> Conversation:
    """The same in the pipeline's form.

    Raises:
        InvalidRequest: a text that must be JSON is none, or the rest contradicts itself.
    """
    require_at_most(MAX_MESSAGES, len(given.messages), "messages")
    require_at_most(MAX_TOOLS, len(given.tools), "tools")
    documents = _json(given.documents_json or "null", "messages.documents_json", (list, type(None)))
    if not all(isinstance(document, dict) for document in documents or ()):
        raise InvalidRequest("messages.documents_json must be a list of objects", param="documents_json")
    opens_turn = given.add_generation_prompt if given.HasField("add_generation_prompt") else None
    return Conversation(
        messages=[_message(message) for message in given.messages],
        add_generation_prompt=not given.continue_final_message if opens_turn is None else opens_turn,
        continue_final_message=given.continue_final_message,
        chat_template=given.chat_template or None,
        template_variables=_object(given.chat_template_kwargs_json, "messages.chat_template_kwargs_json"),
        documents=documents,
        tools=[_tool(tool, f"messages.tools[{index}]") for index, tool in enumerate(given.tools)],
        tool_choice=_choice(given.tool_choice),
        parallel_tool_calls=not given.HasField("parallel_tool_calls") or given.parallel_tool_calls,
        include_reasoning=not given.HasField("include_reasoning") or given.include_reasoning,
    )


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role}
    if message.content or not message.tool_calls:
        turn["content"] = message.content
    if message.HasField("name"):
        turn["name"] = message.name
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.HasField("reasoning"):
        turn["reasoning_content"] = message.reasoning
    return turn


def _call(call: pb.ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": read_arguments(call.arguments_json)}
    return {"id": call.id, "type": "function", "function": function}


def _tool(tool: pb.Tool, path: str) -> Tool:
    definition: dict[str, Any] = {"name": tool.name}
    if tool.description:
        definition["description"] = tool.description
    if tool.parameters_json:
        definition["parameters"] = _object(tool.parameters_json, f"{path}.parameters_json")
    return Tool(definition=definition, strict=tool.strict)


def _choice(choice: pb.ToolChoice) -> ToolChoice:
    kind = choice.WhichOneof("choice")
    if kind is None:
        return ToolChoice()
    if kind == "named":
        return ToolChoice(kind="named", name=choice.named)
    if not getattr(choice, kind):
        raise InvalidRequest(
            f"messages.tool_choice.{kind} is false; set the choice that is meant to true", param="tool_choice"
        )
    return ToolChoice(kind=kind)


def _object(text: str, param: str) -> dict[str, Any]:
    value: dict[str, Any] = _json(text or "{}", param, (dict,))
    return value


def _json(text: str, param: str, kinds: tuple[type, ...]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param} is no JSON: {error}", param=param) from error
    if not isinstance(value, kinds):
        wanted = "a list" if list in kinds else "an object"
        raise InvalidRequest(f"{param} must be {wanted}, in JSON", param=param)
    return value
