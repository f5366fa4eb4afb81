"""Every way in which clients ask for structured output becomes the same constraint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frontend.http.body import parse
from frontend.http.openai.schemas.structured import StructuredFields
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import StructuredOutput

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}, "required": ["b"]}
IN_OPENAIS_FORM = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


def read(body: dict[str, Any]) -> StructuredOutput | None:
    return parse(StructuredFields, json.dumps(body).encode()).structured_output()


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": IN_OPENAIS_FORM},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_every_form_of_a_schema_keeps_its_order_and_characters(body: dict[str, Any]) -> None:
    structured = read(body)
    assert structured is not None
    assert structured.json_schema == json.dumps(SCHEMA, ensure_ascii=False)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, StructuredOutput(choices=("yes", "no"))),
        ({"guided_choice": ["yes", "no"]}, StructuredOutput(choices=("yes", "no"))),
        ({"structured_outputs": {"grammar": 'root ::= "x"'}}, StructuredOutput(grammar='root ::= "x"')),
        ({"guided_grammar": 'root ::= "x"'}, StructuredOutput(grammar='root ::= "x"')),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None}, None),
        ({}, None),
    ],
)
def test_every_kind_is_understood(body: dict[str, Any], expected: StructuredOutput | None) -> None:
    assert read(body) == expected


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": {**IN_OPENAIS_FORM, "type": "json_object"}},
            "response_format.json_schema",
            'needs type "json_schema"',
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "response_format and guided_regex are set",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.choice",
            "one constraint",
        ),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "Unrecognized",
        ),
        ({"guided_json": "{"}, "guided_json", "is no JSON"),
        ({"guided_json": " " * 2_000_000 + "{}"}, "guided_json", "has 2000002 characters"),
        ({"guided_json": 5}, "guided_json", "guided_json is wrong"),
        ({"guided_choice": []}, "guided_choice", "none empty"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "none empty"),
        ({"guided_regex": ""}, "guided_regex", "is empty"),
        ({"guided_regex": "a" * 300_000}, "structured_output", "300000 characters long"),
    ],
)
def test_wrong_constraints_are_named(body: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        read(body)
    assert raised.value.param == param
