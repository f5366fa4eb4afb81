"""Typed access to config.json, with errors that name the file, the field and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pagewire.base.errors import ConfigError

# Far beyond any model, and small enough that no product of them overflows and that a model of this many
# layers is built in seconds: what the file asks for is compared with the memory there is after that.
LARGEST = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**14,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**27,
    "sliding_window": 2**27,
    "original_max_position_embeddings": 2**31,
}


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """Typed access to a JSON object, with errors that name the file and the field."""

    values: Mapping[str, Any]
    source: str

    def error(self, name: str, value: object, allowed: str) -> ConfigError:
        """Says that the field has this value and must be what is `allowed`."""
        return ConfigError(f"{self.source}: {name} is {value!r}; it must be {allowed}")

    def fail(self, name: str, value: object, allowed: str) -> NoReturn:
        """Raises `error`."""
        raise self.error(name, value, allowed)

    def positive(self, name: str, default: int | None = None) -> int:
        """A positive integer of at most LARGEST[name]."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, value, "a positive integer")
        if value > LARGEST[name]:
            self.fail(name, value, f"at most {LARGEST[name]}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.values.get(name)
        if value is None:
            value = default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
            self.fail(name, value, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        """A truth value; a missing one is false."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return bool(value)
