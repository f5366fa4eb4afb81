"""Answers held to a form."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from tests.conformance.schemas import judge, random_schema
from tests.conformance.target import Target

MESSAGES = [
    {"role": "developer", "content": "Answer in JSON."},
    {"role": "user", "content": "Where is Paris?"},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "country": {"type": "string", "maxLength": 12},
        "continent": {"enum": ["Europe", "Asia"]},
        "rivers": {"type": "array", "items": {"$ref": "#/$defs/river"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["country", "continent", "rivers"],
    "additionalProperties": False,
    "$defs": {"river": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"}},
}


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_an_answer_validates_against_its_schema(target: Target) -> None:
    reply = target.reply(messages=MESSAGES, response_format=of_schema(SCHEMA), max_tokens=80)
    assert reply.finish_reason == "stop"
    jsonschema.validate(json.loads(reply.message.content), SCHEMA)


def test_an_answer_has_only_the_properties_that_a_schema_names(target: Target) -> None:
    """As pydantic writes schemas, which say nothing of others: the answer ends by itself all the same."""
    place = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}
    schema = {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/place"},
            "size": {"anyOf": [{"enum": [1, 2]}, {"type": "null"}]},
        },
        "required": ["place"],
        "$defs": {"place": place},
    }
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        reply = target.reply(messages=MESSAGES, response_format=form, max_tokens=60)
        assert reply.finish_reason == "stop"
        answer = json.loads(reply.message.content)
        jsonschema.validate(answer, schema)
        assert answer.keys() <= {"place", "size"}
        assert answer["place"].keys() == {"hot"}


def test_json_object_is_an_object(target: Target) -> None:
    reply = target.reply(
        messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=40, logit_bias={"113": 0}
    )
    text = reply.message.content.strip()
    assert text.startswith("{")
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_text_is_as_without_a_format(target: Target) -> None:
    plain = target.reply(messages=MESSAGES, max_tokens=6).message.content
    formatted = target.reply(messages=MESSAGES, max_tokens=6, response_format={"type": "text"})
    assert formatted.message.content == plain


@pytest.mark.extension
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]{4}"}, r"\d{3}-[a-f]{4}"),
        ({"choice": ["Certainly.", "Never (ever)."]}, r"Certainly\.|Never \(ever\)\."),
        (
            {"grammar": 'root ::= digit (" + " digit)+ " = " digit\ndigit ::= [0-4]'},
            r"[0-4]( \+ [0-4])+ = [0-4]",
        ),
        ({"json": {"type": "integer", "minimum": 20, "maximum": 29}}, r"2\d"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_constraint_holds(target: Target, constraint: dict[str, Any], pattern: str) -> None:
    """For samples at a high temperature, of a completion as of a chat."""
    asked: dict[str, Any] = {
        "temperature": 2,
        "seed": 1,
        "n": 3,
        "max_tokens": 60,
        "structured_outputs": constraint,
    }
    texts = [choice.text for choice in target.completion(prompt="Well:", **asked).choices]
    texts += [choice.message.content for choice in target.chat(messages=MESSAGES, **asked).choices]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(set(texts)) > 1


@pytest.mark.extension
@pytest.mark.parametrize(
    ("old", "value", "pattern"),
    [
        ("guided_regex", "(ab){2}", "abab"),
        ("guided_choice", ["yes"], "yes"),
        ("guided_grammar", 'root ::= "x" "y"', "xy"),
        ("guided_json", {"const": 7}, "7"),
    ],
)
def test_older_names_hold_too(target: Target, old: str, value: Any, pattern: str) -> None:
    assert target.choice(prompt="Well:", max_tokens=8, **{old: value}).text.strip() == pattern


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "format": "no-such-format"}, "format"),
        ({"$ref": "#/$defs/missing"}, "\\$ref"),
        ({"type": "strin"}, "strin"),
    ],
    ids=["unevaluatedProperties", "format", "ref", "type"],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword(
    target: Target, schema: dict[str, Any], keyword: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=keyword) as refused:
        target.chat(messages=MESSAGES, response_format=of_schema(schema), max_tokens=8)
    if target.directory is not None:
        assert refused.value.param == "response_format.json_schema.schema"


def test_answers_of_random_schemas_validate(target: Target, model_directory: Any) -> None:
    """A few such as tools/random_schemas.py tries; on the suite's own server, whose seeds repeat."""
    seeds = range(1, 13)
    with ThreadPoolExecutor(len(seeds)) as pool:
        outcomes = list(
            pool.map(lambda seed: judge(target.http, random_schema(seed), seed, max_tokens=60), seeds)
        )
    assert [each for each in outcomes if each.kind == "wrong"] == []
    assert sum(each.kind == "valid" for each in outcomes) >= 10


def test_free_and_constrained_requests_share_a_batch(target: Target) -> None:
    free = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    held = {**free, "response_format": of_schema({"enum": ["left", "right"]})}
    [alone] = target.texts([free])
    texts = target.texts([free, held] * 3)
    assert texts[::2] == [alone] * 3
    assert {json.loads(text) for text in texts[1::2]} <= {"left", "right"}
