"""What a tool parser is. docs/tool-parsers.md says how to add one."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from frontend.chat.grammar import Marks
from frontend.chat.tools import Tool


@dataclass(frozen=True, slots=True)
class Text:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins. `id` is empty where the format has none; then one is drawn."""

    name: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that began last; together they are to be a JSON object."""

    json: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks, in formats that tell it apart as they do calls."""

    text: str


Event = Text | Call | Arguments | Reasoning


class ToolParser(ABC):
    """Reads one reply as it comes and says which of it is text and which is a call.

    What it returns may depend on the reply only, never on where it was cut: feed it one character at a time
    or all at once, and the events add up to the same. A reply that only looks like a call is text, and is
    returned whole.

    Attributes:
        name: what `--tool-call-parser` calls it.
        markers: texts in the format that some tokenizers have as special tokens. They are shown to the
            parser, where otherwise special tokens are left out of a reply.
        is_generic: whether the model does not know the format of itself: it is told of it in the prompt, and
            held to it.
        stops: texts that end a reply with tools, because what follows is not the model's to say.
        reads_all: whether it reads replies without tools too: such a reply is not its answer as it is.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()
    is_generic: ClassVar[bool] = False
    stops: ClassVar[tuple[str, ...]] = ()
    reads_all: ClassVar[bool] = False

    def __init__(self, tool_names: Collection[str]) -> None:
        """Args:
        tool_names: the functions that may be called.
        """
        self.tool_names = frozenset(tool_names)

    @classmethod
    def recognizes(cls, template: str) -> bool:
        """Whether a chat template, in its source, tells the model to call tools in this format."""
        return False

    @classmethod
    def grammar(cls, tools: Sequence[Tool], marks: Marks, *, parallel: bool, alone: bool) -> str | None:
        """Calls of these tools that fit their schemas (`Tool.enforced`): rules in llguidance's Lark syntax
        that define `text`, what a reply without calls looks like, and `calls`, the calls with the text
        before them, if there may be one. They may use TEXT and SPACE. None if the format cannot be held to a
        schema; then strict tools are refused unless the choice forces a call.

        Args:
            tools: at least one.
            marks: how to write the format's marks.
            parallel: whether there may be several calls.
            alone: whether calls are to be at the beginning of the reply, without text before them.
        """
        return None

    @classmethod
    def frame(cls, marks: Marks) -> tuple[str, str]:
        """What stands before the answer in a reply that is held to a form, as the beginning of a rule's right
        side, and the rules that it uses. Both are empty if the answer is the whole reply."""
        return "", ""

    @staticmethod
    def new_id() -> str:
        """An id for a call whose format has none."""
        return f"call_{secrets.token_hex(12)}"

    @abstractmethod
    def push(self, text: str) -> list[Event]:
        """Takes more of the reply and returns what is certain of it."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """What was held back, now that the reply has ended, perhaps in the middle of a call."""
