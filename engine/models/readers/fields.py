"""Typed access to config.json, with errors that name the file, the field and what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    "seq_length": 2**27,
    "sliding_window_pattern": 1024,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "moe_intermediate_size": 2**22,
    "shared_expert_intermediate_size": 2**22,
    "decoder_sparse_step": 1024,
}


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """Typed access to a JSON object, with errors that name the file and the field.

    Attributes:
        names: of fields that the file calls otherwise, their names there, such as "num_hidden_layers" ->
            ("n_layer",); the first that the file has counts.
    """

    values: Mapping[str, Any]
    source: str
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def own_name(self, name: str) -> str:
        """What the file calls a field."""
        known = self.names.get(name, ())
        return next((own for own in known if own in self.values), known[0] if known else name)

    def get(self, name: str, default: object = None) -> Any:
        """The value of a field, unchecked; the default where it is missing or null."""
        value = self.values.get(self.own_name(name))
        return default if value is None else value

    def error(self, name: str, value: object, allowed: str) -> ConfigError:
        """Says that the field has this value and must be what is `allowed`."""
        return ConfigError(f"{self.source}: {self.own_name(name)} is {value!r}; it must be {allowed}")

    def fail(self, name: str, value: object, allowed: str) -> NoReturn:
        """Raises `error`."""
        raise self.error(name, value, allowed)

    def positive(self, name: str, default: int | None = None) -> int:
        """A positive integer of at most LARGEST[name]."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, value, "a positive integer")
        if value > LARGEST[name]:
            self.fail(name, value, f"at most {LARGEST[name]}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            self.fail(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return value

    def require(self, name: str, needed: object, default: object) -> None:
        """Refuses any value of a field but the one that is implemented.

        Args:
            default: what the family takes for a field that is missing or null.
        """
        value = self.get(name, default)
        if value != needed:
            self.fail(name, value, f"{needed!r}; nothing else is implemented")
