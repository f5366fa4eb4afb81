"""Random JSON schemas whose instances are short, so that an answer ends within some hundred tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import httpx
import jsonschema

_NAMES = ("name", "size", "tags", "kind", "at", "näme", "a b", "x-1", "$id2", 'quo"te')
_WORDS = ("red", "blue", "Zürich", "", "a\nb", "naïve 🙂", "null", "1")
_PATTERNS = ("^[a-z]{1,5}$", "^\\d{2,4}-[A-F]$", "^(ab|cd)+$", "^\\S{1,4}$", "[0-9]", "^x?y{0,2}z$")
_FORMATS = ("date", "uuid", "ipv4")  # those that end
MAX_DEPTH = 3


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of the kinds that people send: objects, lists, references, unions and bounds of all sorts."""
    random = Random(seed)
    definitions = {
        f"def{number}": _schema(random, MAX_DEPTH - 1, []) for number in range(random.randrange(3))
    }
    kind = random.choice((_object, _object, _object, _array, _union, _scalar))
    schema = kind(random, 0, list(definitions))
    return {**schema, "$defs": definitions} if definitions else schema


@dataclass(frozen=True)
class Outcome:
    """What came of asking for an answer of a schema, and what there is to say of it."""

    kind: Literal["valid", "refused", "cut", "wrong"]
    detail: str
    num_tokens: int = 0


def judge(client: httpx.Client, schema: dict[str, Any], seed: int, max_tokens: int) -> Outcome:
    """Asks for an answer of the schema, and validates it."""
    body = {
        "messages": [{"role": "user", "content": "Give an example, as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}},
        "temperature": 1,
        "frequency_penalty": 0.2,  # a small model does not end a fraction by itself
        "seed": seed,
        "max_tokens": max_tokens,
    }
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return Outcome("refused" if answer.status_code == 400 else "wrong", answer.text)
    [choice], usage = answer.json()["choices"], answer.json()["usage"]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        return Outcome("cut", text, usage["completion_tokens"])
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return Outcome("wrong", f"{text!r}: {error}", usage["completion_tokens"])
    return Outcome("valid", text, usage["completion_tokens"])


def _schema(random: Random, depth: int, references: list[str]) -> dict[str, Any]:
    """Some schema at this depth; `references` are the names of the definitions that it may use."""
    if references and random.random() < 0.25:
        return {"$ref": f"#/$defs/{random.choice(references)}"}
    kinds = [_scalar] * 3 if depth >= MAX_DEPTH else [_object, _array, _union, _scalar, _scalar]
    return random.choice(kinds)(random, depth, references)


def _object(random: Random, depth: int, references: list[str]) -> dict[str, Any]:
    names = random.sample(_NAMES, random.choice((0, 1, 2, 2, 3)))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(random, depth + 1, references) for name in names},
        "required": [name for name in names if random.random() < 0.8],
        "additionalProperties": False,
    }
    if random.random() < 0.15:
        schema["additionalProperties"] = _scalar(random, depth, references)
        schema["maxProperties"] = len(names) + 1
    if random.random() < 0.3:
        schema |= {"title": "T", "description": "What it is."}
    return schema


def _array(random: Random, depth: int, references: list[str]) -> dict[str, Any]:
    low = random.choice((0, 0, 1, 2))
    schema: dict[str, Any] = {"type": "array", "minItems": low, "maxItems": low + random.randrange(2)}
    if random.random() < 0.25:
        schema["prefixItems"] = [_scalar(random, depth, references) for _ in range(2)]
        schema |= {"minItems": 2, "maxItems": 3}
    return {**schema, "items": _schema(random, depth + 1, references)}


def _union(random: Random, depth: int, references: list[str]) -> dict[str, Any]:
    if random.random() < 0.25:
        return {"type": random.sample(["string", "boolean", "null"], 2), "maxLength": 5}
    members = [_schema(random, depth + 1, references) for _ in range(random.choice((2, 3)))]
    if random.random() < 0.15:
        return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": random.randrange(3, 99)}]}
    return {"anyOf": members}


def _scalar(random: Random, depth: int, references: list[str]) -> dict[str, Any]:
    return random.choice((_string, _string, _integer, _integer, _number, _fixed))(random)


def _string(random: Random) -> dict[str, Any]:
    low = random.choice((0, 0, 1, 3))
    bounded = {"type": "string", "minLength": low, "maxLength": low + random.randrange(9)}
    return random.choice(
        (
            bounded,
            bounded,
            {"type": "string", "pattern": random.choice(_PATTERNS), "maxLength": 12},
            {"type": "string", "format": random.choice(_FORMATS)},
        )
    )


def _integer(random: Random) -> dict[str, Any]:
    low = random.choice((-1000, -7, 0, 1, 10, 99))
    schema = {"type": "integer", "minimum": low, "maximum": low + random.choice((0, 1, 5, 120, 99999))}
    if random.random() < 0.2:
        schema["multipleOf"] = random.choice((1, 2, 5))
        schema["maximum"] += 10
    return schema


def _number(random: Random) -> dict[str, Any]:
    low = random.choice((-10.5, -1, 0, 0.25, 3))
    names = random.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
    schema = {"type": "number", names[0]: low, names[1]: low + random.choice((0.5, 1, 100))}
    if random.random() < 0.6:
        schema["multipleOf"] = random.choice((0.5, 0.25, 0.125))
    return schema


def _fixed(random: Random) -> dict[str, Any]:
    return random.choice(
        (
            {"type": "boolean"},
            {"type": "null"},
            {"const": random.choice((1, "x", None, True, [1, "a"], {"k": 0}))},
            {"enum": random.sample(_WORDS, 3)},
            {"enum": [0, "none", None, False]},
        )
    )
