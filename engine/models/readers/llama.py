"""config.json of the Llama family: Llama, Mistral and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.config import LayerConfig, ModelConfig
from engine.models.readers.eos import read_eos_token_ids
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rotary
from engine.models.readers.window import read_sliding_windows
from pagewire.base.errors import ConfigError


def read_llama(
    fields: ConfigFields, architecture: str, eos_sources: Mapping[str, Mapping[str, Any]]
) -> ModelConfig:
    """See families.ReadConfig."""
    _refuse_unsupported(fields)
    hidden_size = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.positive("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "even, for the rotary embedding")
    rotary = read_rotary(fields, head_dim)
    windows = read_sliding_windows(fields, architecture, fields.positive("num_hidden_layers"))
    vocab_size = fields.positive("vocab_size")
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.positive("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        layers=tuple(LayerConfig(rotary=rotary, sliding_window=window) for window in windows),
        attention_scale=head_dim**-0.5,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=read_eos_token_ids(eos_sources, vocab_size),
        dtype=str(fields.values.get("dtype") or fields.values.get("torch_dtype") or ""),
    )


def _refuse_unsupported(fields: ConfigFields) -> None:
    """Refuses what would change the model's output if it were ignored."""
    values = fields.values
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.fail("hidden_act", activation, "'silu'; no other activation is implemented")
    quantization = values.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            fields.fail("quantization_config", quantization, "an object or null")
        method = quantization.get("quant_method", "unknown")
        raise ConfigError(f"{fields.source}: the weights are quantized ({method}); that is not implemented")
