"""Typed access to the description of a quantization, with errors that name the file and the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagewire.base.errors import ConfigError

LARGEST_GROUP = 2**22


@dataclass(frozen=True, slots=True)
class QuantFields:
    """A JSON object.

    Attributes:
        source: the file, and where in it, for errors.
        method: what the format is called, for errors.
    """

    values: Mapping[str, Any]
    source: str
    method: str

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that there is; the default where all are missing or null."""
        found = (self.values[name] for name in names if self.values.get(name) is not None)
        return next(found, default)

    def error(self, what: str, allowed: str) -> ConfigError:
        """Says what is not supported, and what is."""
        return ConfigError(f"{self.source}: {self.method}: {what}; {allowed}")

    def bits(self, *names: str, allowed: Sequence[int], default: int | None = None) -> int:
        """A number of bits, one of those allowed."""
        value = self.get(*names, default=default)
        if type(value) is not int or value not in allowed:
            raise self.error(f"{names[0]} is {value!r}", f"supported are {', '.join(map(str, allowed))}")
        return value

    def group_size(self, *names: str, default: int | None = None) -> int:
        """How many inputs share a scale; 0 for all of them, which files write as -1."""
        value = self.get(*names, default=default)
        if value == -1:
            return 0
        if type(value) is not int or not 0 < value <= LARGEST_GROUP or value % 8:
            raise self.error(f"{names[0]} is {value!r}", "it must be -1, or a positive multiple of 8")
        return value

    def flag(self, *names: str, default: bool) -> bool:
        """A truth value."""
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.error(f"{names[0]} is {value!r}", "it must be true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of these words."""
        value = self.get(name, default=default)
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.error(f"{name} {value!r} is not supported", f"supported are {', '.join(allowed)}")
        return value.lower()

    def names(self, *names: str) -> list[str]:
        """A list of names, empty where there is none."""
        value = self.get(*names, default=[])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(f"{names[0]} is {value!r}", "it must be a list of names of modules")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object within, unchecked; empty where it is missing or null."""
        found = self.inner(name)
        return {} if found is None else found.values

    def inner(self, name: str) -> QuantFields | None:
        """An object within; None where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{name} is {value!r}", "it must be an object or null")
        return QuantFields(value, f"{self.source}.{name}", self.method)
