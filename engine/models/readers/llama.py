"""config.json of Llama and of what is Llama but for a detail: Mistral, Yi, InternLM2, Qwen 1.5 to 3,
Granite, OLMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.config import ModelConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary
from engine.models.readers.window import read_sliding_windows

EosSources = Mapping[str, Mapping[str, Any]]


def read_llama(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Llama, Mistral, Yi, SmolLM2 and their like."""
    parts = {"mlp_bias": fields.flag("mlp_bias"), **_attention_bias(fields)}
    return _read(fields, architecture, eos_sources, **parts)


def read_internlm2(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Llama with other names."""
    has_bias = fields.flag("bias")
    return _read(fields, architecture, eos_sources, qkv_bias=has_bias, o_bias=has_bias)


def read_qwen2(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Qwen 1.5, 2 and 2.5: queries, keys and values have a bias, whatever the file
    says."""
    return _read(fields, architecture, eos_sources, qkv_bias=True)


def read_qwen3(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    return _read(fields, architecture, eos_sources, qk_norm="heads", **_attention_bias(fields))


def read_granite(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Granite 3 scales at four places."""
    return _read(
        fields,
        architecture,
        eos_sources,
        mlp_bias=fields.flag("mlp_bias"),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
        **_attention_bias(fields),
    )


def read_olmo2(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. OLMo 2 normalises what a part adds, not what it reads (arXiv:2501.00656)."""
    return _read(
        fields,
        architecture,
        eos_sources,
        norm_inputs=False,
        norm_outputs=True,
        qk_norm="projection",
        **_attention_bias(fields),
    )


def _read(fields: ConfigFields, architecture: str, eos_sources: EosSources, **parts: Any) -> ModelConfig:
    _, _, head_dim = read_heads(fields)
    windows = read_sliding_windows(fields, architecture, fields.positive("num_hidden_layers"))
    rotary = read_rotary(fields, head_dim)
    return read_decoder(fields, architecture, eos_sources, rotary, windows=windows, **parts)


def _attention_bias(fields: ConfigFields) -> dict[str, bool]:
    has_bias = fields.flag("attention_bias")
    return {"qkv_bias": has_bias, "o_bias": has_bias}
