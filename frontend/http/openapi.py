"""The OpenAPI document (version 3.1), made from the endpoints and the models of what they take and answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http.client import responses as phrases
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from frontend.generation.request import MAX_REQUEST_ID_LENGTH
from frontend.http.bounds import with_bounds
from frontend.http.endpoint import Endpoint
from pagewire.base.version import __version__

Json = dict[str, Any]

_REFERENCE = "#/components/schemas/{model}"
_REQUEST_ID = {"$ref": "#/components/parameters/RequestId"}
_ABOUT = (
    "Serves a large language model. The API is OpenAI's, with the further fields that other servers of the "
    "field take; under /v1/messages it is Anthropic's, under /api Ollama's, under /v2 Triton's. Every answer "
    'has the header `x-request-id`; every error is an object with an `"error"`. Unknown fields are refused, '
    "unless the server was started with --allow-unknown-fields. The defaults of temperature, top_p, top_k, "
    "min_p and repetition_penalty hold where the model's generation_config.json has none."
)


def openapi_document(endpoints: Sequence[Endpoint], *, with_keys: bool) -> Json:
    """The whole document.

    Args:
        endpoints: what it is about.
        with_keys: whether this server asks for API keys.
    """
    schemas = _Schemas(endpoints)
    paths: Json = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    keys: list[Json] = [{"bearer": []}, {"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "pagewire", "version": __version__, "description": _ABOUT},
        "security": keys if with_keys else [{}, *keys],
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "parameters": {
                "RequestId": {
                    "name": "x-request-id",
                    "in": "header",
                    "description": "Names the request in its answer and in the server's log.",
                    "schema": {
                        "type": "string",
                        "maxLength": MAX_REQUEST_ID_LENGTH,
                        "pattern": "^[ -~]*$",
                    },
                }
            },
            "headers": {
                "RequestId": {"description": "The request's id.", "schema": {"type": "string"}},
                "RelaxedSchemas": {
                    "description": "What was asked for and is not enforced, if anything: tools.NAME or "
                    "response_format.KEYWORD, separated by commas; ... where they are too many.",
                    "schema": {"type": "string"},
                },
            },
            "responses": {kind.__name__: _error(kind, schemas) for kind in _errors(endpoints)},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


class _Schemas:
    """The JSON Schemas of all models, and references to them."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        wanted: list[tuple[Any, JsonSchemaMode]] = [(kind, "serialization") for kind in _errors(endpoints)]
        for endpoint in endpoints:
            if endpoint.body is not None:
                wanted.append((endpoint.body, "validation"))
            answers = (endpoint.answer, endpoint.event)
            wanted += [(kind, "serialization") for kind in answers if kind is not None]
        adapters = {(repr(kind), mode): TypeAdapter(kind) for kind, mode in wanted}
        inputs = [(name, mode, adapter) for (name, mode), adapter in adapters.items()]
        self._references, rest = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE)
        definitions: Json = rest.get("$defs", {})
        self.definitions = {name: with_bounds(definition) for name, definition in definitions.items()}

    def taken(self, kind: Any) -> Json:
        """A reference to the schema of a body."""
        return self._references[repr(kind), "validation"]

    def answered(self, kind: Any) -> Json:
        """A reference to the schema of an answer."""
        return self._references[repr(kind), "serialization"]


def _operation(endpoint: Endpoint, schemas: _Schemas) -> Json:
    operation: Json = {
        "operationId": endpoint.name,
        "tags": [endpoint.tag],
        "summary": endpoint.summary,
        "parameters": [_REQUEST_ID],
        "responses": {},
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    if not endpoint.needs_key:
        operation["security"] = []
    operation["parameters"] += [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    if endpoint.body is not None:
        content: Json = {"schema": schemas.taken(endpoint.body)}
        if endpoint.example:
            content["example"] = dict(endpoint.example)
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    if endpoint.answer is not None or endpoint.media_type != "application/json":
        operation["responses"]["200"] = _answer(endpoint, schemas)
    for status in sorted(endpoint.errors):
        operation["responses"][str(status)] = {
            "$ref": f"#/components/responses/{endpoint.error.__name__}",
            "description": phrases.get(status, "Overloaded"),  # 529 is Anthropic's own
        }
    return operation


def _answer(endpoint: Endpoint, schemas: _Schemas) -> Json:
    schema = {"type": "string"} if endpoint.answer is None else schemas.answered(endpoint.answer)
    content: Json = {endpoint.media_type: {"schema": schema}}
    if endpoint.event is not None and endpoint.event_media_type != "text/event-stream":
        content[endpoint.event_media_type] = {"schema": schemas.answered(endpoint.event)}
    elif endpoint.event is not None:
        content["text/event-stream"] = {
            # Of one event, as tools read it before OpenAPI 3.2 and its `itemSchema`.
            "schema": {
                "type": "object",
                "description": "With `stream: true`: server-sent events, each with JSON as its data.",
                "properties": {
                    "event": {"type": "string"},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": schemas.answered(endpoint.event),
                    },
                },
                "required": ["data"],
            }
        }
    headers = _request_id_header()
    if endpoint.event is not None:
        headers["x-pagewire-relaxed-schemas"] = {"$ref": "#/components/headers/RelaxedSchemas"}
    return {"description": "It worked.", "headers": headers, "content": content}


def _errors(endpoints: Sequence[Endpoint]) -> list[type]:
    """The models of errors, in the order in which they are first used."""
    return list(dict.fromkeys(endpoint.error for endpoint in endpoints))


def _error(kind: type, schemas: _Schemas) -> Json:
    return {
        "description": "It did not work.",
        "headers": _request_id_header(),
        "content": {"application/json": {"schema": schemas.answered(kind)}},
    }


def _request_id_header() -> Json:
    return {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
