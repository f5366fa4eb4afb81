"""What the config.json of most families has in common: Llama's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.layers.norm_config import NormConfig
from engine.models.config import ExpertsConfig, LayerConfig, ModelConfig, RotaryConfig
from engine.models.readers.eos import read_eos_token_ids
from engine.models.readers.fields import ConfigFields

# What config.json calls an activation -> what it is called here.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_decoder(
    fields: ConfigFields,
    architecture: str,
    eos_sources: Mapping[str, Mapping[str, Any]],
    rotary: RotaryConfig | None,
    *,
    windows: Sequence[int] = (),
    experts: Sequence[ExpertsConfig | None] = (),
    **parts: Any,
) -> ModelConfig:
    """A model that is like Llama but for its `parts`, which are fields of ModelConfig.

    Args:
        fields: the names that the family has for Llama's fields are in `fields.names`.
        rotary: of all layers.
        windows: each layer's sliding window; none where it is empty.
        experts: each layer's; none where it is empty.
    """
    num_layers = fields.positive("num_hidden_layers")
    num_heads, num_kv_heads, head_dim = read_heads(fields)
    vocab_size = fields.positive("vocab_size")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=fields.positive("hidden_size"),
        intermediate_size=fields.positive("intermediate_size"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.positive("max_position_embeddings", 2048),
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-6)),
        activation=read_activation(fields, "hidden_act", "silu"),
        layers=tuple(
            LayerConfig(rotary=rotary, sliding_window=window, experts=layer_experts)
            for window, layer_experts in zip(
                windows or [0] * num_layers, experts or [None] * num_layers, strict=True
            )
        ),
        attention_scale=head_dim**-0.5,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=read_eos_token_ids(eos_sources, vocab_size),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or ""),
    )
    scaling = None if rotary is None else rotary.scaling
    if scaling is not None and scaling.kind == "dynamic":
        longest = int(scaling.original_max_position * scaling.factor)
        config = replace(config, longest_context=max(longest, config.max_position_embeddings))
    return replace(config, **parts)


def read_heads(fields: ConfigFields) -> tuple[int, int, int]:
    """(query heads, key-value heads, size of a head)."""
    hidden_size = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.positive("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "even, for the rotary embedding")
    return num_heads, num_kv_heads, head_dim


def read_activation(fields: ConfigFields, name: str, default: str) -> str:
    """The activation of the feed-forward part's gate."""
    activation = fields.get(name, default)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        fields.fail(name, activation, f"one of {allowed}; no other activation is implemented")
    return ACTIVATIONS[activation]
