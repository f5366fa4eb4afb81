"""config.json of Gemma 1 to 3, text only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.layers.norm_config import NormConfig
from engine.models.config import LayerConfig, ModelConfig, RotaryConfig
from engine.models.readers.decoder import read_activation, read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rope, read_rotary
from engine.models.readers.window import read_layer_types

EosSources = Mapping[str, Mapping[str, Any]]


def read_gemma(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    _, _, head_dim = read_heads(fields)
    return _read(fields, architecture, eos_sources, read_rotary(fields, head_dim))


def read_gemma2(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Every other layer, from the first on, has a window."""
    _, _, head_dim = read_heads(fields)
    num_layers = fields.positive("num_hidden_layers")
    types = read_layer_types(fields, num_layers, every=2)
    window = fields.positive("sliding_window", 4096)
    return _read(
        fields,
        architecture,
        eos_sources,
        read_rotary(fields, head_dim),
        windows=[window if is_windowed else 0 for is_windowed in types],
        norm_outputs=True,
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_soft_cap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def read_gemma3(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Every sixth layer sees all of its context; the others have a window and rotate
    by a base of their own."""
    if architecture == "Gemma3ForConditionalGeneration":
        text = fields.values.get("text_config")
        if not isinstance(text, dict):
            fields.fail("text_config", text, "an object")
        inherited = {name: fields.values[name] for name in ("dtype", "torch_dtype") if name in fields.values}
        fields = ConfigFields({**inherited, **text}, f"{fields.source}: text_config", fields.names)
        # The classes' defaults; such files name only what differs.
        fields = replace(fields, values={**_GEMMA3_TEXT_DEFAULTS, **fields.values})
    fields.require("use_bidirectional_attention", False, False)
    _, _, head_dim = read_heads(fields)
    num_layers = fields.positive("num_hidden_layers")
    every = fields.positive("sliding_window_pattern", 6)
    types = read_layer_types(fields, num_layers, every=every)
    window = fields.positive("sliding_window", 4096)
    whole, local = _gemma3_rotaries(fields, head_dim)
    layers = (
        LayerConfig(rotary=local, sliding_window=window) if is_windowed else LayerConfig(rotary=whole)
        for is_windowed in types
    )
    return _read(
        fields,
        architecture,
        eos_sources,
        whole,
        layers=tuple(layers),
        norm_outputs=True,
        qk_norm="heads",
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=_cap(fields, "attn_logit_softcapping", 0.0),
        logit_soft_cap=_cap(fields, "final_logit_softcapping", 0.0),
    )


_GEMMA3_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def _read(
    fields: ConfigFields,
    architecture: str,
    eos_sources: EosSources,
    rotary: RotaryConfig,
    **parts: Any,
) -> ModelConfig:
    has_bias = fields.flag("attention_bias")
    activation = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    # Gemma 1's first files say "gelu" and mean its approximation, as do those that say nothing.
    name = read_activation(fields, activation, "gelu_pytorch_tanh")
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        rotary,
        **{
            "norm": NormConfig(eps=fields.number("rms_norm_eps", 1e-6), one_plus=True),
            "activation": "gelu_tanh" if name == "gelu" else name,
            "embedding_scale": fields.positive("hidden_size") ** 0.5,
            "qkv_bias": has_bias,
            "o_bias": has_bias,
            "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
            **parts,
        },
    )


def _gemma3_rotaries(fields: ConfigFields, head_dim: int) -> tuple[RotaryConfig, RotaryConfig]:
    """How layers rotate that see all of their context, and those that have a window."""
    parameters = fields.get("rope_parameters")
    if isinstance(parameters, dict) and ("full_attention" in parameters or "sliding_attention" in parameters):
        return (
            read_rope(fields, parameters.get("full_attention"), head_dim, default_theta=1e6),
            read_rope(fields, parameters.get("sliding_attention"), head_dim, default_theta=1e4),
        )
    whole = read_rope(
        fields, fields.get("rope_scaling"), head_dim, default_theta=fields.number("rope_theta", 1e6)
    )
    return whole, RotaryConfig(rotary_dim=head_dim, theta=fields.number("rope_local_base_freq", 1e4))


def _cap(fields: ConfigFields, name: str, default: float) -> float:
    """A soft cap; null is none, and a missing one is the family's."""
    if name not in fields.values:
        return default
    return 0.0 if fields.values[name] is None else fields.number(name)
