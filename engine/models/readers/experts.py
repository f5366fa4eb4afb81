"""config.json of mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.layers.expert_config import GatedActivation
from engine.models.config import ExpertsConfig, ModelConfig
from engine.models.readers.decoder import read_activation, read_decoder, read_heads
from engine.models.readers.fields import ConfigFields
from engine.models.readers.rope import read_rope, read_rotary
from engine.models.readers.window import read_layer_types, read_sliding_windows

EosSources = Mapping[str, Mapping[str, Any]]

# What transformers takes where a gpt-oss file does not say.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_MXFP4_GROUP = 32


def read_mixtral(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    experts = _read_experts(fields, fields.positive("intermediate_size"), default_top_k=2, is_local=True)
    num_layers = fields.positive("num_hidden_layers")
    return _read(fields, architecture, eos_sources, experts=[experts] * num_layers)


def read_qwen2_moe(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Qwen1.5-MoE and Qwen2-57B-A14B."""
    experts = _read_experts(
        fields,
        fields.positive("moe_intermediate_size", 1408),
        renormalise=fields.flag("norm_topk_prob"),
        shared_size=fields.positive("shared_expert_intermediate_size", 5632),
    )
    qkv_bias = fields.flag("qkv_bias", True)
    return _read(fields, architecture, eos_sources, experts=_sparse(fields, experts), qkv_bias=qkv_bias)


def read_qwen3_moe(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig."""
    experts = _read_experts(
        fields, fields.positive("moe_intermediate_size", 768), renormalise=fields.flag("norm_topk_prob")
    )
    has_bias = fields.flag("attention_bias")
    parts = {"qk_norm": "heads", "qkv_bias": has_bias, "o_bias": has_bias}
    return _read(fields, architecture, eos_sources, experts=_sparse(fields, experts), **parts)


def read_gpt_oss(fields: ConfigFields, architecture: str, eos_sources: EosSources) -> ModelConfig:
    """See families.ReadConfig. Weights of experts are MXFP4 as published, or plain numbers as transformers
    saves them."""
    fields.require("hidden_act", "silu", "silu")
    _, _, head_dim = read_heads(fields)
    num_layers = fields.positive("num_hidden_layers")
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or _GPT_OSS_ROPE
    rotary = read_rope(fields, parameters, head_dim, default_theta=150000.0)
    window = fields.positive("sliding_window", 128)
    windows = [window if has_window else 0 for has_window in read_layer_types(fields, num_layers, every=2)]
    alpha, limit = fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)
    experts = replace(
        _read_experts(fields, fields.positive("intermediate_size"), is_local=True),
        activation=GatedActivation("clamped", alpha, limit),
        bias=True,
        router_bias=True,
        weight_format=_read_weight_format(fields),
    )
    has_bias = fields.flag("attention_bias", True)
    return read_decoder(
        fields,
        architecture,
        eos_sources,
        rotary,
        windows=windows,
        experts=[experts] * num_layers,
        qkv_bias=has_bias,
        o_bias=has_bias,
        attention_sinks=True,
    )


def _read(fields: ConfigFields, architecture: str, eos_sources: EosSources, **parts: Any) -> ModelConfig:
    _, _, head_dim = read_heads(fields)
    windows = read_sliding_windows(fields, architecture, fields.positive("num_hidden_layers"))
    return read_decoder(
        fields, architecture, eos_sources, read_rotary(fields, head_dim), windows=windows, **parts
    )


def _read_experts(
    fields: ConfigFields,
    intermediate_size: int,
    *,
    default_top_k: int = 4,
    is_local: bool = False,
    **parts: Any,
) -> ExpertsConfig:
    """The experts of a layer. `is_local`: whether the family calls their number num_local_experts."""
    # Which of the two a file has depends on the release of transformers; errors name the family's own.
    names = ("num_local_experts", "num_experts") if is_local else ("num_experts", "num_local_experts")
    fields = replace(fields, names={"num_experts": names})
    num_experts = fields.positive("num_experts")
    top_k = fields.positive("num_experts_per_tok", default_top_k)
    if top_k > num_experts:
        fields.fail("num_experts_per_tok", top_k, f"at most the number of experts ({num_experts})")
    activation = GatedActivation(read_activation(fields, "hidden_act", "silu"))
    return ExpertsConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        activation=activation,
        **parts,
    )


def _sparse(fields: ConfigFields, experts: ExpertsConfig) -> Sequence[ExpertsConfig | None]:
    """Qwen's layers: every `decoder_sparse_step`th has experts, but for those in `mlp_only_layers`."""
    # Which layers it is for depends on the release of transformers, and no published model has one.
    fields.require("use_sliding_window", False, False)
    num_layers, step = fields.positive("num_hidden_layers"), fields.positive("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        fields.fail("mlp_only_layers", dense, "a list of numbers of layers")
    return [
        experts if layer not in dense and (layer + 1) % step == 0 else None for layer in range(num_layers)
    ]


def _read_weight_format(fields: ConfigFields) -> str:
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4":
        return ""
    for name in ("hidden_size", "intermediate_size"):
        size = fields.positive(name)
        if size % _MXFP4_GROUP:
            fields.fail(name, size, f"a multiple of {_MXFP4_GROUP} for MXFP4 weights")
    return "mxfp4"
