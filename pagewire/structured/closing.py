"""Holds the objects of a JSON Schema to the properties that it names.

By JSON Schema's letter, an object whose schema names properties may have any others besides. Schemas as
pydantic, zod and most people write them mean no others, and a model that is held to the letter goes on
inventing properties until it runs out of tokens.

An object is closed (`additionalProperties: false`) where its schema names properties (`properties`,
`patternProperties`) and says nothing of others (`additionalProperties`, `unevaluatedProperties`,
`propertyNames`). Several schemas may apply to one object: those of allOf, anyOf and oneOf, what a `$ref`
points to, and the schema that has these keywords. If each were closed by itself, they would forbid one
another's properties. So the names that all of them give are gathered, and one of them is closed with all
names: what `unevaluatedProperties: false` means, as far as that is known without an instance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from pagewire.wire.sampling_params import MAX_CONSTRAINT_LENGTH, StructuredOutput

_VALUE = (
    "items",
    "additionalItems",
    "unevaluatedItems",
    "contains",
    "additionalProperties",
    "unevaluatedProperties",
)
_VALUES = ("items", "prefixItems")
_VALUES_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_ALTERNATIVES = ("anyOf", "oneOf")
_CONDITIONAL = ("if", "then", "else")
_CONDITIONAL_BY_NAME = ("dependentSchemas", "dependencies")
_SAYS_WHAT_ELSE = ("additionalProperties", "propertyNames", "const", "enum")
_MAX_WORK = 300_000
"""Schemas and names looked at: a third of a second. No schema of this size that means well needs as many."""


@lru_cache(64)
def with_closed_objects(structured: StructuredOutput) -> StructuredOutput:
    """The constraint, with the objects of its JSON Schema held to the properties that this names.

    A schema that cannot be read or would become too large is left as it is, and so is every other kind of
    constraint.
    """
    if structured.json_schema is None:
        return structured
    try:
        schema = json.loads(structured.json_schema)
    except (ValueError, RecursionError):
        return structured  # whoever compiles it says what is wrong
    closed = close_objects(schema)
    if closed == schema:
        return structured
    text = json.dumps(closed, ensure_ascii=False)
    return StructuredOutput(json_schema=text) if len(text) <= MAX_CONSTRAINT_LENGTH else structured


def close_objects(schema: Any) -> Any:
    """A schema that allows what this one does, but no object with properties that it does not name. One that
    is nested too deeply or refers to itself in too many ways is returned as it is."""
    try:
        return _Closing(schema).whole()
    except (RecursionError, _TooMuchWork):
        return schema


class _TooMuchWork(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Names:
    """What a schema, together with those that it applies to the same object, says of names of properties.

    Attributes:
        known: the names that it gives, in their order.
        is_list: whether it lists properties in the way that means no others.
        has_patterns: whether it gives names by patterns too.
        says_what_else: whether it says itself what other properties there may be.
        at_least: how many properties it asks for.
    """

    known: tuple[str, ...] = ()
    is_list: bool = False
    has_patterns: bool = False
    says_what_else: bool = False
    at_least: int = 0

    @property
    def matter(self) -> bool:
        """Whether the schema has a part in how an object is closed."""
        return self.is_list or bool(self.known)


class _Closing:
    """Closes one schema.

    Attributes:
        _root: the schema, which is not changed.
        _names_of_targets: what is known of the targets of references.
        _opened: for references whose targets apply together with other schemas, references to copies of the
            targets that are not closed themselves.
        _definitions: these copies.
        _work: how much more may be done.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names_of_targets: dict[str, _Names] = {}
        self._opened: dict[str, str] = {}
        self._definitions: dict[str, Any] = {}
        self._work = _MAX_WORK

    def whole(self) -> Any:
        closed = self._close(self._root)
        if self._definitions:
            given = closed.get("$defs")
            closed["$defs"] = {**(given if isinstance(given, dict) else {}), **self._definitions}
        return closed

    def _close(self, schema: Any, more: tuple[str, ...] = ()) -> Any:
        """A schema for values, with their objects closed.

        Args:
            more: names that other schemas for the same values give.
        """
        if schema is True and more:
            schema = {}
        if not isinstance(schema, dict):
            return schema
        names = self._names(schema)
        known = _union(more, names.known)
        if names.says_what_else or names.at_least > len(known) or not self._may_be_object(schema):
            return self._open(schema)
        parts = self._parts(schema)
        if len(parts) > 1 or more:
            return self._close_together(schema, more)
        return self._close_part(schema, *parts[0]) if parts else self._open(schema)

    def _parts(self, schema: dict[str, Any]) -> list[tuple[str, int]]:
        """What of a schema has a part in how its objects are closed: keywords, "" for those of the object
        itself, and which of the schemas of an allOf."""
        parts = [("", 0)] if _own_names(schema).matter else []
        for keyword, index, names in self._applied(schema):
            part = (keyword, index if keyword == "allOf" else 0)
            if names.matter and part not in parts:
                parts.append(part)
        return parts

    def _close_part(self, schema: dict[str, Any], keyword: str, index: int) -> dict[str, Any]:
        """Closes a schema where it has one part alone."""
        opened = self._opened_copy({key: value for key, value in schema.items() if key != keyword})
        if keyword == "":
            return self._closed_with(opened, ()) if _own_names(schema).is_list else opened
        part = schema[keyword]
        if keyword == "allOf":
            part = [self._close(each) if at == index else self._open(each) for at, each in enumerate(part)]
        elif keyword in _ALTERNATIVES:
            part = [self._close(each) for each in part]
        elif keyword != "$ref":  # whose target is closed itself
            return self._opened_copy(schema)
        opened[keyword] = part
        return opened

    def _close_together(self, schema: dict[str, Any], more: tuple[str, ...]) -> dict[str, Any]:
        """Closes a schema of several parts: each of its alternatives with the names that the other parts
        give, or else the schema itself with all names."""
        names = self._names(schema)
        if names.has_patterns or not (names.is_list or more):
            return self._opened_copy(schema)
        for keyword in _ALTERNATIVES:
            branches = _list_in(schema, keyword)
            if any(self._names(branch).is_list for branch in branches):
                others = {key: value for key, value in schema.items() if key != keyword}
                given = _union(more, self._names(others).known)
                return {
                    **self._opened_copy(others),
                    keyword: [self._close(branch, given) for branch in branches],
                }
        return self._closed_with(self._opened_copy(schema), _union(names.known, more))

    def _closed_with(self, opened: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """A schema whose objects have its own properties, and those of these names, and no others."""
        self._count(len(names))
        properties = opened.get("properties", {})
        required = _own_names(opened).known
        added = {name: True for name in (*names, *required) if name not in properties}
        if added:
            opened["properties"] = {**properties, **added}
        opened["additionalProperties"] = False
        return opened

    def _open(self, schema: Any) -> Any:
        """A schema in which all is closed but the object that it describes itself."""
        return self._opened_copy(schema) if isinstance(schema, dict) else schema

    def _opened_copy(self, schema: dict[str, Any]) -> dict[str, Any]:
        self._count(len(schema))
        opened = dict(schema)
        for keyword, value in schema.items():
            if isinstance(value, list) and keyword in _VALUES:
                opened[keyword] = [self._close(each) for each in value]
            elif keyword in _VALUE:
                opened[keyword] = self._close(value)
            elif isinstance(value, dict) and keyword in _VALUES_BY_NAME:
                opened[keyword] = {name: self._close(each) for name, each in value.items()}
            elif isinstance(value, list) and keyword in ("allOf", *_ALTERNATIVES):
                opened[keyword] = [self._open(each) for each in value]
            elif keyword in _CONDITIONAL:
                opened[keyword] = self._open(value)
            elif isinstance(value, dict) and keyword in _CONDITIONAL_BY_NAME:
                opened[keyword] = {name: self._open(each) for name, each in value.items()}
            elif isinstance(value, str) and keyword == "$ref":
                opened[keyword] = self._open_target(value)
        return opened

    def _open_target(self, reference: str) -> str:
        """A reference to a copy of the target that is not closed itself, if that makes a difference."""
        if not self._names_of_target(reference).matter:
            return reference
        if reference not in self._opened:
            name = f"pagewire-open-{len(self._opened)}"
            self._opened[reference] = f"#/$defs/{name}"
            self._definitions[name] = self._open(self._target(reference))
        return self._opened[reference]

    def _names(self, schema: Any) -> _Names:
        if not isinstance(schema, dict):
            return _Names()
        own, applied = _own_names(schema), list(self._applied(schema))
        self._count(1 + len(own.known) + sum(len(names.known) for _, _, names in applied))
        always = [own, *(names for keyword, _, names in applied if keyword in ("allOf", "$ref"))]
        every = [own, *(names for _, _, names in applied)]
        return _Names(
            _union(*(names.known for names in every)),
            any(names.is_list for names in every),
            any(names.has_patterns for names in every),
            any(names.says_what_else for names in always),
            max(names.at_least for names in always),
        )

    def _applied(self, schema: dict[str, Any]) -> Iterator[tuple[str, int, _Names]]:
        """The schemas that a schema applies to the same value: by which keyword, which of several, and what
        they say of names."""
        for keyword in ("allOf", *_ALTERNATIVES):
            for index, each in enumerate(_list_in(schema, keyword)):
                yield keyword, index, self._names(each)
        if isinstance(schema.get("$ref"), str):
            yield "$ref", 0, self._names_of_target(schema["$ref"])
        for keyword in _CONDITIONAL:
            if keyword in schema:
                yield keyword, 0, self._names(schema[keyword])
        for keyword in _CONDITIONAL_BY_NAME:
            for each in _values_in(schema, keyword):
                yield keyword, 0, self._names(each)

    def _names_of_target(self, reference: str) -> _Names:
        names = self._names_of_targets.get(reference)
        if names is None:
            self._names_of_targets[reference] = _Names()  # for a schema that applies itself to its own values
            target = self._target(reference)
            names = _Names(says_what_else=True) if target is None else self._names(target)
            self._names_of_targets[reference] = names
        return names

    def _target(self, reference: str) -> Any:
        """The schema that a reference points to; None if it is not in the root, as a JSON pointer."""
        if not reference.startswith("#"):
            return None
        target = self._root
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            else:
                return None
            if isinstance(target, dict) and "$id" in target:
                return None  # references in it would begin there
        return target if "/" in reference or reference == "#" else None

    def _may_be_object(self, schema: dict[str, Any]) -> bool:
        """Whether the types that a schema names, or the one that it refers to, include objects."""
        kinds = schema.get("type")
        if kinds is None and isinstance(schema.get("$ref"), str):
            target = self._target(schema["$ref"])
            kinds = target.get("type") if isinstance(target, dict) else None
        return kinds is None or kinds == "object" or (isinstance(kinds, list) and "object" in kinds)

    def _count(self, work: int) -> None:
        self._work -= work
        if self._work < 0:
            raise _TooMuchWork


def _own_names(schema: dict[str, Any]) -> _Names:
    """What a schema says of names by itself, without the others that it applies."""
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    required = [*_list_in(schema, "required")]
    for keyword in ("dependentRequired", "dependencies"):
        required += [name for each in _values_in(schema, keyword) if isinstance(each, list) for name in each]
    whole = [*_list_in(schema, "enum"), schema.get("const")]
    listed = [name for value in whole if isinstance(value, dict) for name in value]
    at_least = schema.get("minProperties")
    return _Names(
        _union(properties if isinstance(properties, dict) else (), filter(_is_text, required), listed),
        isinstance(properties, dict) or isinstance(patterns, dict),
        isinstance(patterns, dict),
        any(keyword in schema for keyword in _SAYS_WHAT_ELSE)
        or schema.get("unevaluatedProperties", False) is not False,
        at_least if isinstance(at_least, int) else 0,
    )


def _union(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in names for name in each))


def _list_in(schema: dict[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _values_in(schema: dict[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return list(value.values()) if isinstance(value, dict) else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
