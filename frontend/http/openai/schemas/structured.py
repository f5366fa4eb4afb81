"""The fields by which clients say what an answer must look like: OpenAI's, vLLM's and vLLM's older ones."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from frontend.http.body import Body
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import MAX_CONSTRAINT_LENGTH, STRUCTURED_OUTPUTS, StructuredOutput

Schema = dict[str, Any]

_MAX_TEXT = 4 * MAX_CONSTRAINT_LENGTH
"""Characters of a schema that comes as text, which may be indented. It is read on the event loop."""


class JsonSchemaFormat(Body):
    """OpenAI's named schema. It is enforced whether or not it is `strict`; see `strict_schema`."""

    name: str = ""
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_structured(self) -> StructuredOutput | None:
        """None for plain text.

        Raises:
            InvalidRequest: the schema is missing, or is there for another type.
        """
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise InvalidRequest(
                    f'response_format.json_schema is set; it needs type "json_schema", not "{self.type}"',
                    param="response_format.json_schema",
                )
            return StructuredOutput(json_object=True) if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequest(
                'response_format.json_schema.schema is missing; type "json_schema" needs it',
                param="response_format.json_schema.schema",
            )
        return StructuredOutput(json_schema=json.dumps(self.json_schema.schema_, ensure_ascii=False))


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of its fields."""

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class StructuredFields(Body):
    """What generating endpoints take; all ways together may give one constraint."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structured_output(self) -> StructuredOutput | None:
        """The constraint asked for, if one is.

        Raises:
            InvalidRequest: there are two, or one is wrong in itself.
        """
        found = {name: constraint for name, constraint in self._constraints() if constraint is not None}
        if len(found) > 1:
            raise InvalidRequest(
                f"{' and '.join(found)} are set; an answer can have one constraint", param=list(found)[1]
            )
        return next(iter(found.values()), None)

    def strict_schema(self) -> bool:
        """Whether a schema is to be refused rather than relaxed: all but a response_format that is not
        `strict`."""
        schema = self.response_format.json_schema if self.response_format else None
        return schema is None or bool(schema.strict)

    def constraint_field(self) -> str | None:
        """The field that the constraint came by, if there is one."""
        names = [name for name, constraint in self._constraints() if constraint is not None]
        if names == ["response_format"] and self.response_format and self.response_format.json_schema:
            return "response_format.json_schema.schema"
        return next(iter(names), None)

    def _constraints(self) -> list[tuple[str, StructuredOutput | None]]:
        nested = self.structured_outputs or StructuredOutputs()
        response_format = self.response_format.to_structured() if self.response_format else None
        return [
            ("response_format", response_format),
            ("structured_outputs.json", _json("structured_outputs.json", nested.json_)),
            ("structured_outputs.json_object", _object(nested.json_object)),
            ("structured_outputs.regex", _regex("structured_outputs.regex", nested.regex)),
            ("structured_outputs.choice", _choice("structured_outputs.choice", nested.choice)),
            ("structured_outputs.grammar", _grammar("structured_outputs.grammar", nested.grammar)),
            ("guided_json", _json("guided_json", self.guided_json)),
            ("guided_regex", _regex("guided_regex", self.guided_regex)),
            ("guided_choice", _choice("guided_choice", self.guided_choice)),
            ("guided_grammar", _grammar("guided_grammar", self.guided_grammar)),
        ]


def named_after(field: str | None, error: InvalidRequest) -> InvalidRequest:
    """A refusal of a constraint, of which the field is at fault that the constraint came by."""
    if field is None or error.param not in _PIPELINES_NAMES:
        return error
    return InvalidRequest(error.message, param=field)


_PIPELINES_NAMES = ("structured_output", *(f"structured_output.{name}" for name in STRUCTURED_OUTPUTS))


def _json(param: str, schema: Schema | str | None) -> StructuredOutput | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        if len(schema) > _MAX_TEXT:
            raise InvalidRequest(
                f"{param} has {len(schema)} characters; it must have at most {_MAX_TEXT}", param=param
            )
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param} is no JSON: {error}", param=param) from error
    return StructuredOutput(json_schema=json.dumps(schema, ensure_ascii=False))


def _object(wanted: bool | None) -> StructuredOutput | None:
    return StructuredOutput(json_object=True) if wanted else None


def _regex(param: str, regex: str | None) -> StructuredOutput | None:
    return None if regex is None else StructuredOutput(regex=_not_empty(param, regex))


def _choice(param: str, choices: list[str] | None) -> StructuredOutput | None:
    if choices is None:
        return None
    if not choices or "" in choices:
        raise InvalidRequest(f"{param} must be a list of texts, none empty", param=param)
    return StructuredOutput(choices=choices)


def _grammar(param: str, grammar: str | None) -> StructuredOutput | None:
    return None if grammar is None else StructuredOutput(grammar=_not_empty(param, grammar))


def _not_empty(param: str, text: str) -> str:
    if not text:
        raise InvalidRequest(f"{param} is empty", param=param)
    return text
