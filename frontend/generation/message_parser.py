"""The seam between generated text and the message that it stands for.

A model writes what it thinks and the calls that it makes into its text, in a format of its own. A parser
takes that text as it comes and says which of it is content, which is reasoning, and which is a call. A
request names how to make one (`GenerationRequest.new_parser`); each of its completions gets its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A call of a tool, or more of one.

    Attributes:
        index: which of the completion's calls.
        id: the call's id, with its first delta; empty after it.
        name: the function, with its first delta; empty after it.
        arguments: more of its arguments; all deltas' together are a JSON object.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class MessagePart:
    """What new text says. Any of these may be empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class MessageParser(Protocol):
    """Reads the text of one completion, once."""

    def push(self, text: str, *, last: bool) -> MessagePart:
        """Takes more text and returns what is certain of it. However the text is cut into pieces, the parts
        add up to the same.

        Args:
            text: may be empty.
            last: no more comes: what was held back is to be returned.
        """


NewParser = Callable[[], MessageParser]
