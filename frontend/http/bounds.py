"""What is checked of fields after their types, as JSON Schema says it: for readers of /openapi.json.

The checks themselves are `SamplingParams`' and the requests' own; a test holds these bounds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frontend.chat.conversation import MAX_MESSAGES, ROLES
from frontend.chat.tools import MAX_TOOLS
from frontend.generation.request import INT32_RANGE, MAX_CACHE_SALT_LENGTH, MAX_REQUEST_ID_LENGTH
from pagewire.wire.sampling_params import (
    INT32_MAX,
    INT64_RANGE,
    MAX_BAD_WORDS,
    MAX_COMPLETIONS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_TOKEN_LIST,
)

Bounds = Mapping[str, Any]

_LOGPROBS: Bounds = {"minimum": 0, "maximum": MAX_LOGPROBS}
_COMPLETIONS: Bounds = {"minimum": 1, "maximum": MAX_COMPLETIONS}
_PENALTY: Bounds = {"minimum": -2, "maximum": 2}
_LIMIT: Bounds = {"minimum": 1, "maximum": INT32_MAX}

SAMPLING_BOUNDS: Mapping[str, Bounds] = {
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": INT32_MAX},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "seed": {"minimum": INT64_RANGE.start, "maximum": INT64_RANGE.stop - 1},
    "min_tokens": {"minimum": 0, "maximum": INT32_MAX},
    "max_tokens": {"minimum": 0, "maximum": INT32_MAX},
    "prompt_logprobs": _LOGPROBS,
    "n": _COMPLETIONS,
    "best_of": _COMPLETIONS,
}
"""By the name of a field, which is that of the parameter."""

FIELD_BOUNDS: Mapping[str, Bounds] = {
    **SAMPLING_BOUNDS,
    "max_completion_tokens": _LIMIT,
    "max_output_tokens": _LIMIT,
    "max_tool_calls": {"minimum": 1},
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "stop": {"maxItems": MAX_STOP_STRINGS},
    "bad_words": {"maxItems": MAX_BAD_WORDS},
    "stop_token_ids": {"maxItems": MAX_TOKEN_LIST},
    "allowed_token_ids": {"minItems": 1, "maxItems": MAX_TOKEN_LIST},
    "logit_bias": {"maxProperties": MAX_TOKEN_LIST},
    "priority": {"minimum": INT32_RANGE.start, "maximum": INT32_RANGE.stop - 1},
    "request_id": {"maxLength": MAX_REQUEST_ID_LENGTH, "pattern": "^[ -~]*$"},
    "cache_salt": {"maxLength": MAX_CACHE_SALT_LENGTH},
    "dimensions": {"minimum": 1},
    "truncate_prompt_tokens": {"minimum": -1, "maximum": INT32_MAX},
    "messages": {"minItems": 1, "maxItems": MAX_MESSAGES},
    "tools": {"maxItems": MAX_TOOLS},
    "role": {"enum": list(ROLES)},
    "pooling": {"enum": ["last", "mean", "cls"]},
}

_FOR_TYPE = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "exclusiveMinimum": ("integer", "number"),
    "maxLength": ("string",),
    "pattern": ("string",),
    "enum": ("string",),
    "minItems": ("array",),
    "maxItems": ("array",),
    "maxProperties": ("object",),
}


def with_bounds(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A body's schema with the bounds of its fields added where they apply; an answer's as it is."""
    if "additionalProperties" not in definition:
        return dict(definition)
    properties = {
        name: _bounded(schema, FIELD_BOUNDS[name]) if name in FIELD_BOUNDS else schema
        for name, schema in definition.get("properties", {}).items()
    }
    return {**definition, "properties": properties}


def _bounded(schema: Mapping[str, Any], bounds: Bounds) -> dict[str, Any]:
    if "anyOf" in schema:
        return {**schema, "anyOf": [_bounded(each, bounds) for each in schema["anyOf"]]}
    if "enum" in schema:
        return dict(schema)
    kind = schema.get("type")
    return {**{name: value for name, value in bounds.items() if kind in _FOR_TYPE[name]}, **schema}
