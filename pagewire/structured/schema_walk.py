"""Goes through the schemas that a JSON Schema is made of, and through nothing that only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values have schemas by names of the schema's author."""

_INSTANCES = ("const", "enum", "default", "examples")


def rebuilt(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A schema of which every schema that is an object was changed, inner ones first.

    Args:
        change: gets a copy that it may change and return.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(schema, list):
        return [rebuilt(each, change) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return change(
        {
            key: {name: rebuilt(each, change) for name, each in value.items()}
            if key in BY_NAME and isinstance(value, dict)
            else value
            if key in _INSTANCES
            else rebuilt(value, change)
            for key, value in schema.items()
        }
    )
