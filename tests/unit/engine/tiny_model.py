"""A Llama small enough to run in a millisecond, as a directory in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of a Hugging Face Llama checkpoint."""
    torch.manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, config.get("attention_bias")),
        "self_attn.o_proj": (hidden, heads * head_dim, config.get("attention_bias")),
        "mlp.gate_proj": (inner, hidden, config.get("mlp_bias")),
        "mlp.up_proj": (inner, hidden, config.get("mlp_bias")),
        "mlp.down_proj": (hidden, inner, config.get("mlp_bias")),
    }
    weights = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden),
        "model.norm.weight": 1 + 0.1 * torch.randn(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, bias) in linears.items():
            weights[f"{prefix}.{name}.weight"] = torch.randn(rows, columns) / columns**0.5
            if bias:
                weights[f"{prefix}.{name}.bias"] = torch.randn(rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = 1 + 0.1 * torch.randn(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = torch.randn(config["vocab_size"], hidden)
    return weights


def write_model(
    directory: Path, weights: dict[str, torch.Tensor] | None = None, *, shards: int = 1, **changes: Any
) -> Path:
    """Writes config.json and the weights (random ones by default), in one file or several with an index."""
    config = {**CONFIG, **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = tensors(config) if weights is None else weights
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory
