"""Keywords that cannot be enforced are dropped, those at fault only, wherever they are in a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagewire.base.errors import InvalidRequest
from pagewire.structured.relaxing import relaxed
from pagewire.structured.translate import to_grammar
from pagewire.wire.sampling_params import StructuredOutput

TEXT = {"type": "string"}
INT = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "expected", "dropped"),
    [
        ({"type": "string", "maxLength": 3}, {"type": "string", "maxLength": 3}, ()),
        (
            {"properties": {"uniqueItems": {"type": "array", "uniqueItems": True, "maxItems": 3}}},
            {"properties": {"uniqueItems": {"type": "array", "maxItems": 3}}},
            ("uniqueItems",),
        ),
        (
            {"type": "object", "if": {}, "then": {}, "else": {}, "default": {"if": 1}},
            {"type": "object", "default": {"if": 1}},
            ("if", "then", "else"),
        ),
        (
            {"type": "array", "contains": INT, "minContains": 2},
            {"type": "array"},
            ("contains", "minContains"),
        ),
        ({**TEXT, "pattern": "^(?=a)", "maxLength": 4}, {**TEXT, "maxLength": 4}, ("pattern",)),
        ({**TEXT, "format": "uint"}, TEXT, ("format",)),
        ({"properties": {"a": INT}, "minProperties": 1}, {"properties": {"a": INT}}, ("minProperties",)),
        (
            {"oneOf": [INT, {"type": "number"}], "anyOf": [TEXT, INT]},
            {"allOf": [{"anyOf": [TEXT, INT]}], "anyOf": [INT, {"type": "number"}]},
            ("oneOf",),
        ),
    ],
)
def test_what_is_at_fault_is_dropped_and_named(schema: Any, expected: Any, dropped: tuple[str, ...]) -> None:
    found, names = relaxed(StructuredOutput(json_schema=json.dumps(schema)), to_grammar)
    assert found.json_schema is not None
    assert json.loads(found.json_schema) == expected
    assert names == dropped


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"$ref": "#/$defs/a"}, {"not": {}, "type": "strin"}])
def test_what_is_wrong_without_such_a_keyword_is_still_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest):
        relaxed(StructuredOutput(json_schema=json.dumps(schema)), to_grammar)
