"""How request bodies are read. Unknown fields are refused, and so are OpenAI's that are not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pagewire.base.errors import InvalidRequest, Unsupported

TokenIdList = Annotated[list[int], Field(fail_fast=True)]
Seconds = Annotated[float, Field(gt=0)]

_UNSERVED: Mapping[str, tuple[object, ...]] = {
    # Fields that clients of the field know, with the values that ask for nothing beyond what is served.
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Body(BaseModel):
    """Strict: "5" is no number and true is no integer. Unknown fields are kept so as to name them."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        protected_namespaces=(),
        json_schema_extra={"additionalProperties": False},  # as `parse` has it
    )

    forms: ClassVar[Mapping[str, str]] = {}
    """What fields of several forms must be, in words that are better than pydantic's."""


MAX_NESTED = 32768
MAX_VALUES = 2**20
_SMALL_BODY = 64 * 1024

BodyT = TypeVar("BodyT", bound=Body)


def parse(kind: type[BodyT], data: bytes) -> BodyT:
    """Reads a request body.

    Raises:
        InvalidRequest: it is no JSON, has too much in it, or a field is wrong or unknown.
        Unsupported: it asks for a feature that is not served.
    """
    _require_few(data)
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error, kind) from None
    _refuse_extras(body, "")
    return body


def _require_few(data: bytes) -> None:
    """Refuses a body that would take seconds to read, which nobody else would be served in: one of 8 MiB has
    room for a million small objects. Of texts it may be as long as it likes."""
    if len(data) <= _SMALL_BODY or (_num_nested(data) <= MAX_NESTED and data.count(b",") <= MAX_VALUES):
        return
    bare = _without_strings(data)
    if (num_nested := _num_nested(bare)) > MAX_NESTED:
        raise InvalidRequest(
            f"the request body has {num_nested} objects and lists; at most {MAX_NESTED} are taken"
        )
    if (num_values := bare.count(b",")) > MAX_VALUES:
        raise InvalidRequest(f"the request body has {num_values} values; at most {MAX_VALUES} are taken")


def _without_strings(data: bytes) -> bytes:
    """JSON without what its strings say; as quick for millions of strings as for one."""
    unescaped = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.bitwise_xor.accumulate(unescaped == ord('"'))
    return unescaped[~inside].tobytes()


def _num_nested(data: bytes) -> int:
    return data.count(b"{") + data.count(b"[")


def _refuse_extras(body: Body, path: str) -> None:
    """Refuses unknown and unserved fields, here and in nested objects."""
    for name, value in (body.model_extra or {}).items():
        if path or name not in _UNSERVED:
            raise InvalidRequest(f"Unrecognized request argument supplied: {path}{name}", param=path + name)
        if value is not None and value not in _UNSERVED[name]:
            raise Unsupported(f"{name} is not supported by this server", param=name)
    for name in body.__class__.model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            _refuse_extras(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, item in enumerate(value):
                _refuse_extras(item, f"{path}{name}[{index}].")


def _invalid(error: ValidationError, kind: type[Body]) -> InvalidRequest:
    """The first thing that is wrong, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the request body is not valid JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}"
        )
    if not first["loc"]:
        return InvalidRequest("the request body must be a JSON object")
    param = _param(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"you must provide {param}", param=param)
    if param in kind.forms:
        return InvalidRequest(f"{param} must be {kind.forms[param]}", param=param)
    if param.endswith(".content"):
        return InvalidRequest(
            f'{param} must be text: a string, or a list of {{"type": "text", "text": ...}}', param=param
        )
    return InvalidRequest(f"{param} is wrong: {first['msg']}", param=param)


def _param(location: tuple[int | str, ...]) -> str:
    """A location as in "messages[0].content": without the names of union members, be they pydantic's
    or, in angle brackets, ours."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "TextPart"):
            name += f".{part}" if name else part
        elif name and not part.startswith("<"):
            break
    return name
