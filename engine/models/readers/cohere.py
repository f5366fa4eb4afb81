"""config.json of Cohere's Command models and of StableLM: layer norms, and parts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.norm_config import NormConfig
from engine.models.config import LayerConfig, ModelConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary
from engine.models.readers.window import read_layer_types

EosSources = Mapping[str, Mapping[str, Any]]


def read_cohere(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Command R; Command R+ normalises queries and keys too."""
    _, _, head_dim = read_heads(fields)
    rotary = read_rotary(fields, head_dim, interleaved=True)
    qk_norm = "layer" if fields.flag("use_qk_norm") else ""
    return read_decoder(fields, architecture, eos_sources, rotary, qk_norm=qk_norm, **_parts(fields))


def read_cohere2(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Command R7B: every fourth layer sees all of its context, unrotated."""
    _, _, head_dim = read_heads(fields)
    num_layers = fields.positive("num_hidden_layers")
    types = read_layer_types(fields, num_layers, every=fields.positive("sliding_window_pattern", 4))
    window, rotary = fields.positive("sliding_window", 4096), read_rotary(fields, head_dim, interleaved=True)
    layers = (
        LayerConfig(rotary=rotary, sliding_window=window) if is_windowed else LayerConfig(rotary=None)
        for is_windowed in types
    )
    return read_decoder(fields, architecture, eos_sources, rotary, layers=tuple(layers), **_parts(fields))


def _parts(fields: ConfigFields) -> dict[str, Any]:
    has_bias = fields.flag("attention_bias")
    return {
        "norm": NormConfig(kind="layer", eps=fields.number("layer_norm_eps", 1e-5)),
        "parallel_residual": True,
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "logit_scale": fields.number("logit_scale", 0.0625),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
    }


def read_stablelm(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    _, _, head_dim = read_heads(fields)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        read_rotary(fields, head_dim, part=0.25),
        norm=NormConfig(kind="layer", eps=fields.number("layer_norm_eps", 1e-5), bias=True),
        parallel_residual=fields.flag("use_parallel_residual"),
        qkv_bias=fields.flag("use_qkv_bias"),
        qk_norm="layer" if fields.flag("qk_layernorm") else "",
    )
