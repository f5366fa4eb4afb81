"""The functions that a request lets the model call, and whether it must."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import StructuredOutput

MAX_TOOLS = 1024

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        definition: what the model is told of it, as the client wrote it: "name", "description", "parameters"
            (a JSON Schema) and whatever else a template may know.
        strict: whether a call that the model makes of itself is held to the schema too.

    Raises:
        InvalidRequest: the name or the schema is none.
    """

    definition: Mapping[str, Any]
    strict: bool = False

    def __post_init__(self) -> None:
        name = self.definition.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"a tool's function name is {name!r}; it must be 1 to 128 letters, digits, underscores and "
                "hyphens",
                param="tools",
            )
        if not isinstance(self.definition.get("parameters") or {}, dict):
            raise InvalidRequest(
                f"the parameters of tool {name!r} must be a JSON Schema, an object", param="tools"
            )

    @property
    def name(self) -> str:
        return str(self.definition["name"])

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON Schema of the arguments. A function without one takes none."""
        schema: Mapping[str, Any] = self.definition.get("parameters") or _NO_ARGUMENTS
        return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}

    @property
    def enforced(self) -> Mapping[str, Any]:
        """JSON Schema of what calls that the model makes of itself are held to."""
        return self.parameters if self.strict else {"type": "object"}

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"type": "function", "function": dict(self.definition)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools the model may or must call: any or none, none, at least one, or the one named."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""

    @property
    def forced(self) -> bool:
        return self.kind in ("required", "named")


def check_choice(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Checks that a choice can be made of these tools.

    Raises:
        InvalidRequest: two tools have one name, there are too many, or the tool chosen is not there.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are taken", param="tools")
    names = [tool.name for tool in tools]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise InvalidRequest(f"two tools are named {twice!r}; every tool needs its own name", param="tools")
    if choice.forced and not tools:
        raise InvalidRequest(f"tool_choice is {choice.kind}; it needs tools", param="tool_choice")
    if choice.kind == "named" and choice.name not in names:
        raise InvalidRequest(
            f"tool_choice names {choice.name!r}; the tools are {', '.join(map(repr, names))}",
            param="tool_choice",
        )


def forced_calls(tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> StructuredOutput:
    """What a reply must look like that is made of calls: for a named tool its arguments, otherwise a list of
    {"name", "parameters"}.

    Args:
        parallel: whether there may be several calls.
    """
    if choice.kind == "named":
        [tool] = [tool for tool in tools if tool.name == choice.name]
        schema = tool.parameters
    else:
        schema = _calls_schema(tools, parallel=parallel)
    return StructuredOutput(json_schema=json.dumps(schema, ensure_ascii=False))


def _calls_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    call = call_schema(tools, "parameters")
    definitions = call.pop("$defs")
    return {
        "type": "array",
        "minItems": 1,
        **({} if parallel else {"maxItems": 1}),
        "items": call,
        "$defs": definitions,
    }


def call_schema(tools: Sequence[Tool], arguments: str, *, only_strict: bool = False) -> dict[str, Any]:
    """A schema of one call: an object with "name" and the arguments. Every tool's schema becomes a definition
    of the whole, and its references follow it there.

    Args:
        arguments: what the format calls them.
        only_strict: whether other tools' arguments may be any object.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, arguments: {"$ref": f"#/$defs/tool_{index}"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    definitions = {
        f"tool_{index}": _moved(tool.enforced if only_strict else tool.parameters, index)
        for index, tool in enumerate(tools)
    }
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _moved(value: Any, index: int) -> Any:
    """A schema whose references to itself hold where it has become a part of another."""
    if isinstance(value, Mapping):
        moved = {key: each if key in _DATA else _moved(each, index) for key, each in value.items()}
        reference = value.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = f"#/$defs/tool_{index}{reference[1:]}"
        return moved
    if isinstance(value, list):
        return [_moved(each, index) for each in value]
    return value


_DATA = frozenset(("const", "enum", "default", "examples"))
"""Keywords whose values are no schemas."""
