"""How request bodies are read. Unknown fields are refused, and so are known ones that are not served."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pagewire.base.errors import InvalidRequest, Unsupported

logger = logging.getLogger(__name__)

TokenIdList = Annotated[list[int], Field(fail_fast=True)]
Seconds = Annotated[float, Field(gt=0)]

ALLOW_UNKNOWN_FIELDS: ContextVar[bool] = ContextVar("allow_unknown_fields", default=False)
"""Whether the request that is being answered may have unknown fields (--allow-unknown-fields)."""


def _describe(schema: dict[str, Any], kind: type[Body]) -> None:
    """Adds to a body's JSON Schema what `parse` makes of unknown fields, and what fields left out mean."""
    schema["additionalProperties"] = {"type": "null"} if kind.passes_nulls else False
    for name, value in kind.defaults.items():
        schema["properties"][name]["default"] = value


class Body(BaseModel):
    """Strict: "5" is no number and true is no integer. Unknown fields are kept so as to name them."""

    model_config = ConfigDict(
        strict=True, extra="allow", protected_namespaces=(), json_schema_extra=_describe
    )

    forms: ClassVar[Mapping[str, str]] = {}
    """What fields of several forms must be, in words that are better than pydantic's."""

    unserved: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that clients know and that are not served, each with the values that ask for nothing beyond what
    is served; so does null. Any other value is Unsupported."""

    defaults: ClassVar[Mapping[str, object]] = {}
    """What fields mean that are left out or null, for readers of /openapi.json."""

    passes_nulls: ClassVar[bool] = False
    """Whether unknown fields are passed over where they are null, as in parts of earlier answers: clients'
    libraries write every field that their version knows."""


MAX_NESTED = 32768
MAX_VALUES = 2**20
_SMALL_BODY = 64 * 1024
_MAX_NAMES_LOGGED = 256
_names_logged: set[str] = set()

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
        _refuse_extra(body, path + name, name, value)
    for name in body.__class__.model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            _refuse_extras(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, item in enumerate(value):
                _refuse_extras(item, f"{path}{name}[{index}].")


def _refuse_extra(body: Body, param: str, name: str, value: object) -> None:
    if name in body.unserved:
        if value is not None and value not in body.unserved[name]:
            raise Unsupported(f"{param} is not supported by this server", param=param)
    elif value is None and body.passes_nulls:
        return
    elif ALLOW_UNKNOWN_FIELDS.get():
        _log_unknown(body, name)
    else:
        raise InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param)


def _log_unknown(body: Body, name: str) -> None:
    """Logs a field that is ignored, once in this process: clients may send it with every request, and may
    think of any number of names."""
    if len(_names_logged) >= _MAX_NAMES_LOGGED:
        return
    shown = f"{type(body).__name__}.{name[:64]!r}"
    if shown not in _names_logged:
        _names_logged.add(shown)
        logger.warning("an unknown field is ignored in requests (--allow-unknown-fields): %s", shown)


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
