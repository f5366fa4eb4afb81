"""The keys of a GGUF file that describe its model, and the sizes that they give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.reader import GgufFile

# Of the keys below the architecture's name; the engine takes no larger model either.
LARGEST = {
    "embedding_length": 2**20,
    "feed_forward_length": 2**22,
    "expert_feed_forward_length": 2**22,
    "expert_shared_feed_forward_length": 2**22,
    "expert_count": 2**12,
    "expert_used_count": 2**12,
    "block_count": 1024,
    "attention.head_count": 2**16,
    "attention.head_count_kv": 2**16,
    "attention.key_length": 2**14,
    "attention.value_length": 2**14,
    "attention.sliding_window": 2**27,
    "context_length": 2**27,
    "rope.dimension_count": 2**14,
    "rope.scaling.original_context_length": 2**27,
}
_SMALLEST, _GREATEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys that begin with the name of a file's architecture, such as "llama.block_count".

    What is missing, of another type, or beyond any model raises ConfigError, here where the file can be
    named.

    Attributes:
        architecture: the file's `general.architecture`.
    """

    gguf: GgufFile
    architecture: str

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.gguf.metadata

    def key(self, name: str) -> str:
        """The full name of a key."""
        return f"{self.architecture}.{name}"

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer of at most LARGEST[name]."""
        key = self.key(name)
        value: int = self.gguf.require(key, int) if default is None else self.gguf.optional(key, int, default)
        if not 0 < value <= LARGEST[name]:
            raise self.error(f"{key} is {value}; it must be between 1 and {LARGEST[name]}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive and finite number, as the shortest decimal that is the same float32:
        9.999999747378752e-06 is meant as 1e-05."""
        key = self.key(name)
        if default is not None and key not in self.gguf.metadata:
            return default
        value: float = self.gguf.require(key, float)
        if not _SMALLEST <= value <= _GREATEST:
            raise self.error(f"{key} is {value}; it must be a positive and finite float32")
        return shortest(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value: bool = self.gguf.optional(self.key(name), bool, default)
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value: str = self.gguf.optional(self.key(name), str, default)
        return value

    def error(self, what: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self.gguf.path}: {what}")


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """How large the parts of a model are, as its keys say.

    Attributes:
        vocab, hidden, layers, heads, kv_heads, head_dim, context: as config.json's fields have them.
        rotated: how many dimensions of a head are rotated.
        inner: the width of a feed-forward part, `feed_forward_length`.
        experts: how many there are in a layer, 0 for none.
        expert_inner, shared_inner: the width of an expert and of what all tokens share beside the experts.
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    context: int
    experts: int
    expert_inner: int
    shared_inner: int

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Width of all heads."""
        return self.query + 2 * self.key

    @property
    def twice_inner(self) -> int:
        """Width of gate and up in one matrix."""
        return 2 * self.inner

    @property
    def half_inner(self) -> int:
        """Width of gate and of up where `feed_forward_length` counts both."""
        return self.inner // 2


def model_sizes(keys: ModelKeys, vocab_size: int) -> ModelSizes:
    """The sizes of a model.

    Raises:
        ConfigError: one is missing, impossible, or contradicts another.
    """
    hidden = keys.count("embedding_length")
    heads = keys.count("attention.head_count")
    kv_heads = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise keys.error(
            f"{heads} heads of {head_dim} values share {kv_heads} key-value heads; these must divide the "
            "heads, and a head's size must be even"
        )
    value_dim = keys.count("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise keys.error(f"keys have {head_dim} values and values {value_dim}; they must have the same size")
    rotated = keys.count("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise keys.error(
            f"rotates {rotated} dimensions of a head of {head_dim}; it must be an even number of them"
        )
    inner = keys.count("feed_forward_length")
    has_experts = keys.gguf.optional(keys.key("expert_count"), int, 0) != 0
    return ModelSizes(
        vocab=vocab_size,
        hidden=hidden,
        inner=inner,
        layers=keys.count("block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotated=rotated,
        context=keys.count("context_length"),
        experts=keys.count("expert_count") if has_experts else 0,
        expert_inner=keys.count("expert_feed_forward_length", inner),
        shared_inner=keys.count("expert_shared_feed_forward_length", inner),
    )
