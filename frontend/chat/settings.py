"""What the operator decides about conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """Attributes:
    template: a Jinja file, or the template itself, instead of the model's own.
    trust_request_template: whether requests may bring templates.
    tool_call_parser: a parser's name, "auto" or "none".
    tool_parser_plugin: a Python file with further parsers.
    reasoning_parser: a format's name, "auto" or "none".
    """

    template: str | None = None
    trust_request_template: bool = False
    tool_call_parser: str = "auto"
    tool_parser_plugin: Path | None = None
    reasoning_parser: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSettings:
    """What the operator decides about answers that are held to a form.

    Attributes:
        open_schemas: whether objects may have properties that their JSON Schema does not name.
        relax_tool_schemas: whether a tool whose schema cannot be enforced takes any arguments instead.
        relax_schemas: whether keywords that cannot be enforced are left out of a response_format that is
            not strict.
    """

    open_schemas: bool = False
    relax_tool_schemas: bool = False
    relax_schemas: bool = False


def is_template(text: str) -> bool:
    """Whether a text is a template and not a path: it has a brace or a line break."""
    return any(character in text for character in "{}\n")
