"""config.json of the first Qwen, in both generations of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.layers.norm_config import NormConfig
from engine.layers.rope_scaling import RopeScaling
from engine.models.config import ModelConfig, RotaryConfig
from engine.models.readers.decoder import read_decoder, read_heads
from engine.models.readers.fields import ConfigFields

_NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "head_dim": ("kv_channels",),
    "rms_norm_eps": ("layer_norm_epsilon",),
}


def read_qwen1(
    fields: ConfigFields, architecture: str, eos_sources: Mapping[str, Mapping[str, Any]]
) -> ModelConfig:
    """See families.ReadConfig.

    The model is made for `seq_length` tokens. Longer contexts, up to `max_position_embeddings`, may be asked
    for where the file switches on the scaling that they need.
    """
    fields = replace(fields, names=_NAMES)
    fields.require("no_bias", True, True)
    fields.require("rotary_pct", 1.0, 1.0)
    num_heads, _, head_dim = read_heads(fields)
    width = fields.positive("intermediate_size")
    if width % 2:
        fields.fail("intermediate_size", width, "even: it counts gate and up")
    trained = fields.positive("seq_length", 8192)
    longest, scaling = trained, None
    if fields.flag("use_dynamic_ntk"):
        longest = max(trained, fields.positive("max_position_embeddings", trained))
        scaling = RopeScaling(kind="qwen_dynamic", original_max_position=trained)
    theta = fields.number("rotary_emb_base", 10000.0)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        RotaryConfig(rotary_dim=head_dim, theta=theta, scaling=scaling),
        num_key_value_heads=num_heads,
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-6)),
        intermediate_size=width // 2,
        qkv_bias=True,
        max_position_embeddings=trained,
        longest_context=longest,
        log_query_positions=trained if fields.flag("use_logn_attn") else 0,
    )
