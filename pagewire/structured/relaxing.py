"""Takes out of a JSON Schema what cannot be enforced, for those who want the rest rather than nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from pagewire.base.errors import InvalidRequest
from pagewire.structured.schema_walk import rebuilt
from pagewire.wire.sampling_params import StructuredOutput

Check = Callable[[StructuredOutput], object]

_TOGETHER = (("if", "then", "else"), ("contains", "minContains", "maxContains"))
_SIZES = (
    *("maxLength", "minLength", "pattern", "maxItems", "minItems"),
    *("maxProperties", "minProperties", "multipleOf"),
)
"""What makes schemas too complex, where nothing else is said to be the fault."""
_DROPPED = (
    *_SIZES,
    *(name for names in _TOGETHER for name in names),
    *("format", "uniqueItems", "not", "propertyNames", "patternProperties", "oneOf"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedProperties", "unevaluatedItems", "contentEncoding", "contentMediaType", "contentSchema"),
)
_MAX_ROUNDS = 8


def relaxed(structured: StructuredOutput, check: Check) -> tuple[StructuredOutput, tuple[str, ...]]:
    """A schema without the keywords that cannot be enforced, and these keywords.

    Each is dropped wherever it is in the schema; `oneOf` becomes `anyOf`.

    Args:
        structured: a JSON Schema.
        check: raises InvalidRequest for a constraint that cannot be served.

    Raises:
        InvalidRequest: what is wrong is no keyword that could be dropped.
    """
    dropped: list[str] = []
    for _ in range(_MAX_ROUNDS):
        try:
            check(structured)
            return structured, tuple(dropped)
        except InvalidRequest as error:
            structured, more = _without_faults(structured, error)
            dropped += more
    check(structured)
    return structured, tuple(dropped)


def _without_faults(
    structured: StructuredOutput, error: InvalidRequest
) -> tuple[StructuredOutput, list[str]]:
    """A schema without the keywords that are at fault for an error, and these."""
    assert structured.json_schema is not None
    try:
        schema = json.loads(structured.json_schema)
        present = keywords_in(schema, _DROPPED)
        faults = [name for name in present if f'"{name}"' in error.message]
        for together in _TOGETHER:
            if not {*together}.isdisjoint(faults):
                faults += [name for name in together if name in present]
        faults = list(dict.fromkeys(faults)) or [name for name in _SIZES if name in present]
        if not faults:
            raise error
        schema = rebuilt(schema, lambda each: _without(each, faults))
    except (ValueError, RecursionError):
        raise error from None
    return StructuredOutput(json_schema=json.dumps(schema, ensure_ascii=False)), faults


def _without(schema: dict[str, Any], keywords: Collection[str]) -> dict[str, Any]:
    alternatives = schema.get("oneOf") if "oneOf" in keywords else None
    kept = {key: value for key, value in schema.items() if key not in keywords}
    if alternatives is not None:
        also = {"allOf": [{"anyOf": kept.pop("anyOf")}, *kept.pop("allOf", [])]} if "anyOf" in kept else {}
        kept = {**kept, **also, "anyOf": alternatives}
    return kept


def keywords_in(schema: Any, wanted: Collection[str]) -> list[str]:
    """Those keywords that are anywhere in a schema, in the order of `wanted`.

    Raises:
        RecursionError: it is nested too deeply.
    """
    found: set[str] = set()

    def look(each: dict[str, Any]) -> dict[str, Any]:
        found.update(each)
        return each

    rebuilt(schema, look)
    return [name for name in wanted if name in found]
