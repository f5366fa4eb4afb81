"""config.json of ChatGLM2, ChatGLM3 and GLM-4, in the form of their own code and in transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.layers.norm_config import NormConfig
from engine.models.config import ModelConfig, RotaryConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary
from pagewire.base.errors import ConfigError

EosSources = Mapping[str, Mapping[str, Any]]

_NAMES = {
    "num_hidden_layers": ("num_layers",),
    "intermediate_size": ("ffn_hidden_size",),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": ("seq_length",),
    "num_key_value_heads": ("multi_query_group_num",),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("layernorm_epsilon",),
}


def read_chatglm(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    if "padded_vocab_size" not in fields.values:
        raise ConfigError(f"{fields.source}: the first ChatGLM is another architecture, not supported")
    fields = replace(fields, names=_NAMES)
    for name, needed in (
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("multi_query_attention", True),
        ("apply_residual_connection_post_layernorm", False),
        ("add_bias_linear", False),
        ("original_rope", True),
    ):
        fields.require(name, needed, needed)
    _, _, head_dim = read_heads(fields)
    theta = 10000.0 * fields.number("rope_ratio", 1.0)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        RotaryConfig(rotary_dim=head_dim // 2, theta=theta, interleaved=True),
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-5)),
        qkv_bias=fields.flag("add_qkv_bias"),
    )


def read_glm4(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. transformers' classes: of the "Glm4" one, each part normalises what it adds as
    well."""
    _, _, head_dim = read_heads(fields)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        read_rotary(fields, head_dim, part=0.5, interleaved=True),
        norm_outputs=architecture == "Glm4ForCausalLM",
        qkv_bias=fields.flag("attention_bias", True),
    )
