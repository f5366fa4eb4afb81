"""What a conversation is made of in Ollama's API."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from frontend.chat.arguments import read_arguments
from frontend.chat.tools import Tool
from frontend.http.body import Body
from pagewire.base.errors import Unsupported

NO_IMAGES = "images are not served: this server's models read text only"


class OllamaCalledFunction(Body):
    """A function and its arguments, an object."""

    name: str
    arguments: Any = None
    index: int | None = None
    description: str | None = None


class OllamaToolCall(Body):
    """A call that an assistant's turn made. Not all clients keep its id."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaCalledFunction


class OllamaMessage(Body):
    """One turn. An answer's message can be sent back as it came, whatever is missing from it."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class OllamaTool(Body):
    """A function that the model may call."""

    type: Literal["function"] | None = None
    function: dict[str, Any]

    def to_tool(self) -> Tool:
        """In the pipeline's form.

        Raises:
            InvalidRequest: its name or schema is wrong.
        """
        return Tool(definition={key: value for key, value in self.function.items() if value is not None})


Messages = Annotated[list[OllamaMessage], Field(min_length=0)]


def for_template(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """The turns as chat templates expect them.

    Raises:
        Unsupported: a turn has images.
    """
    waiting: deque[tuple[str, str]] = deque()
    turns = []
    for index, message in enumerate(messages):
        if message.images:
            raise Unsupported(NO_IMAGES, param=f"messages[{index}].images")
        calls = [
            _call(call, f"call{index:03d}{number:02d}")
            for number, call in enumerate(message.tool_calls or ())
        ]
        waiting += [(call["id"], call["function"]["name"]) for call in calls]
        call_id, name = message.tool_call_id, message.tool_name or message.name
        if message.role == "tool":
            call_id, name = _answered(call_id, name, waiting)
        turn = {
            "role": message.role,
            "content": None if calls and not message.content else message.content or "",
            "reasoning_content": message.thinking or None,
            "tool_calls": calls or None,
            "name": name,
            "tool_call_id": call_id,
        }
        turns.append({key: value for key, value in turn.items() if value is not None})
    return turns


def _call(call: OllamaToolCall, spare_id: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": read_arguments(call.function.arguments)}
    return {"id": call.id or spare_id, "type": "function", "function": function}


def _answered(
    call_id: str | None, name: str | None, waiting: deque[tuple[str, str]]
) -> tuple[str | None, str | None]:
    """The id and the function of the call that a result is of: the call it names, else the first of its
    function, else the first that has no result yet."""
    if call_id:
        found = next((call for call in waiting if call[0] == call_id), None)
    else:
        found = next((call for call in waiting if call[1] == name), waiting[0] if waiting else None)
    if found is None:
        return call_id, name
    waiting.remove(found)
    return found[0], name or found[1]
