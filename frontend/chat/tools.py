"""The functions that a request lets the model call, and whether it must."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pagewire.base.errors import InvalidRequest
from pagewire.structured.closing import close_objects
from pagewire.wire.sampling_params import StructuredOutput

MAX_TOOLS = 1024

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}
_SAYS_WHICH = (
    *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "const", "enum"),
)
"""Keywords that may say which arguments a function takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        definition: what the model is told of it, as the client wrote it: "name", "description", "parameters"
            (a JSON Schema) and whatever else a template may know.
        strict: whether a call that the model makes of itself is held to the schema too.
        held_to: the schema that calls are held to, where that is another than `parameters`.

    Raises:
        InvalidRequest: the name or the schema is none.
    """

    definition: Mapping[str, Any]
    strict: bool = False
    held_to: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        name = self.definition.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"a tool's function name is {name!r}; it must be 1 to 128 letters, digits, underscores and "
                "hyphens",
                param="tools",
            )
        if not isinstance(self.definition.get("parameters") or {}, dict | bool):
            raise InvalidRequest(
                f"the parameters of tool {name!r} must be a JSON Schema, an object", param="tools"
            )

    @property
    def name(self) -> str:
        return str(self.definition["name"])

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON Schema of the arguments, which are an object. A function without one takes none."""
        schema = self.definition.get("parameters") or _NO_ARGUMENTS
        if schema is True:
            return ANY_ARGUMENTS
        kinds = schema.get("type")
        if (kinds is None and "$ref" not in schema) or (isinstance(kinds, list) and "object" in kinds):
            return {**schema, "type": "object"}
        return cast(Mapping[str, Any], schema)

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON Schema of what the arguments of a call are held to that the model must make."""
        return self.parameters if self.held_to is None else self.held_to

    @property
    def enforced(self) -> Mapping[str, Any]:
        """JSON Schema of what calls that the model makes of itself are held to."""
        return self.schema if self.strict else ANY_ARGUMENTS

    def closed(self) -> Tool:
        """The same, held to the arguments that its schema names. One that names none, and does not say that
        there may be others, takes none."""
        schema = self.parameters
        if not any(keyword in schema for keyword in _SAYS_WHICH):
            schema = {**schema, "properties": {}}
        return replace(self, held_to=close_objects(schema))

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
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
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
        schema = tool.schema
    else:
        schema = calls_schema(tools, "parameters", parallel=parallel)
    return StructuredOutput(json_schema=json.dumps(schema, ensure_ascii=False))


def calls_schema(
    tools: Sequence[Tool], arguments: str, *, parallel: bool, only_strict: bool = False
) -> dict[str, Any]:
    """A schema of a list of calls as `call_schema` has them: of one or more, of exactly one unless
    `parallel`."""
    call = call_schema(tools, arguments, only_strict=only_strict)
    definitions = call.pop("$defs")
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": call, "$defs": definitions}


def call_schema(tools: Sequence[Tool], arguments: str, *, only_strict: bool = False) -> dict[str, Any]:
    """A schema of one call: an object with "name" and the arguments. Every tool's schema becomes a definition
    of the whole, and its references follow it there.

    Args:
        arguments: what the format calls them.
        only_strict: whether other tools' arguments may be any object.
    """
    held = [tool for tool in tools if tool.strict or not only_strict]
    others = [tool.name for tool in tools if only_strict and not tool.strict]
    definitions = {f"tool_{index}": _moved(tool.schema, index) for index, tool in enumerate(held)}
    calls = [
        _one_call({"const": tool.name}, arguments, {"$ref": f"#/$defs/tool_{index}"})
        for index, tool in enumerate(held)
    ]
    if others:
        calls.append(_one_call({"enum": others}, arguments, ANY_ARGUMENTS))
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _one_call(name: Mapping[str, Any], arguments: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": name, arguments: schema},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


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
