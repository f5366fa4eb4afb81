"""What the input of POST /v1/responses is made of: items, and how they become a conversation's turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from frontend.chat.arguments import read_arguments
from frontend.http.body import Body
from frontend.http.openai.schemas.hints import CacheHints
from pagewire.base.errors import InvalidRequest

Status = Literal["in_progress", "completed", "incomplete"]


class _Item(Body):
    """What every item may have besides, as those of an answer do."""

    passes_nulls: ClassVar = True

    id: str | None = None
    status: Status | None = None


class ContentPart(CacheHints):
    """A piece of a message. Only text is served; what the parts of an answer carry besides is not used."""

    passes_nulls: ClassVar = True

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None

    def to_text(self, path: str) -> str:
        text = self.refusal if self.type == "refusal" else self.text
        if text is None:
            name = "refusal" if self.type == "refusal" else "text"
            raise InvalidRequest(f"you must provide {path}.{name}", param=f"{path}.{name}")
        return text


def _kind_of_content(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
    Discriminator(_kind_of_content),
]


class MessageItem(_Item):
    """A turn of the conversation. Only the assistant's may have no content. `phase`, which some of OpenAI's
    answers have, is not used."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content | None = None
    phase: str | None = None


class FunctionCallItem(_Item):
    """A call that the model made. An answer that was cut off has no whole arguments, so that anything is
    taken; `parsed_arguments` is what the official client adds, and not used."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Any = ""
    parsed_arguments: Any = None


class FunctionCallOutputItem(_Item):
    """What a call returned; null is nothing."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content | None = None


class ReasoningPart(Body):
    """A piece of what the model thought, or of a summary of it."""

    passes_nulls: ClassVar = True

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    """What the model thought before it answered."""

    type: Literal["reasoning"]
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None


def _kind_of_item(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="input_item",
        custom_error_message=(
            "its type must be message, function_call, function_call_output or reasoning; nothing is stored "
            "that an item_reference could name, and this server has no tools of its own"
        ),
    ),
]


def _kind_of_input(value: Any) -> str:
    return "<items>" if isinstance(value, list) else "<text>"


Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputItem], Tag("<items>")],
    Discriminator(_kind_of_input),
]


def turns(given: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation's turns, as chat templates expect them.

    What an assistant thought, said and called in one go is one turn, also if it said more after a call.
    Instructions and a system (or developer) message right behind them are one turn too, as many templates
    take no more than one.

    Raises:
        InvalidRequest: an item has no text, or answers a call that is not there.
    """
    collected = _Turns()
    if isinstance(given, str):
        collected.say("user", given)
    else:
        for index, item in enumerate(given):
            collected.add(item, f"input[{index}]")
    if instructions is not None:
        first = collected.turns[0] if collected.turns else None
        if first is not None and first["role"] in ("system", "developer"):
            first["content"] = f"{instructions}\n\n{first['content']}"
        else:
            collected.turns.insert(0, {"role": "system", "content": instructions})
    return collected.turns


class _Turns:
    """Turns in the making."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def say(self, role: str, text: str) -> None:
        self.turns.append({"role": role, "content": text})

    def add(self, item: Any, path: str) -> None:
        match item:
            case MessageItem(role="assistant"):
                turn = self._assistant(continues=lambda turn: not turn["content"] or "tool_calls" in turn)
                turn["content"] += _text(item.content, f"{path}.content")
            case MessageItem():
                if item.content is None:
                    raise InvalidRequest(f"you must provide {path}.content", param=f"{path}.content")
                self.say(item.role, _text(item.content, f"{path}.content"))
            case ReasoningItem():
                parts = item.content or item.summary
                if not parts:
                    return  # only encrypted, which nobody can read
                turn = self._assistant(continues=lambda turn: False)
                turn["reasoning_content"] = "".join(part.text for part in parts)
            case FunctionCallItem():
                turn = self._assistant(continues=lambda turn: True)
                turn.setdefault("tool_calls", []).append(_call(item))
                self._names[item.call_id] = item.name
            case FunctionCallOutputItem():
                if item.call_id not in self._names:
                    raise InvalidRequest(
                        f"{path} answers the call {item.call_id!r}, which no function_call before it has",
                        param=f"{path}.call_id",
                    )
                text = _text(item.output, f"{path}.output")
                self.turns.append(
                    {
                        "role": "tool",
                        "tool_call_id": item.call_id,
                        "name": self._names[item.call_id],
                        "content": text,
                    }
                )

    def _assistant(self, continues: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The last turn, if it is the assistant's and the item belongs to it, or a new one."""
        last = self.turns[-1] if self.turns else None
        if last is None or last["role"] != "assistant" or not continues(last):
            self.say("assistant", "")
        return self.turns[-1]


def _text(content: str | Sequence[ContentPart] | None, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.to_text(f"{path}[{index}]") for index, part in enumerate(content))


def _call(item: FunctionCallItem) -> dict[str, Any]:
    function = {"name": item.name, "arguments": read_arguments(item.arguments)}
    return {"id": item.call_id, "type": "function", "function": function}
