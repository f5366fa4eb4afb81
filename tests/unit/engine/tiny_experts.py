"""A gpt-oss small enough to run in a millisecond, in the layout of its files, with MXFP4 experts or plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, NUM_EXPERTS, NUM_LAYERS = 64, 32, 4, 2
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 16, 301
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 2,
    "experts_per_token": 2,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initial_context_length": 64,
    "intermediate_size": INNER,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": KV_HEADS,
    "num_local_experts": NUM_EXPERTS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 11,
    "swiglu_limit": 1.5,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def write_gpt_oss(mxfp4: Path, plain: Path, num_experts: int = NUM_EXPERTS) -> None:
    """Writes the same model twice: with MXFP4 experts, as it is published, and with their values, as
    transformers saves it."""
    torch.manual_seed(0)
    common: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": 1 + 0.1 * torch.randn(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5,
    }
    packed: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for layer in (f"model.layers.{index}" for index in range(NUM_LAYERS)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            common[f"{layer}.{name}.weight"] = 1 + 0.1 * torch.randn(HIDDEN)
        q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        for name, rows, columns in (
            ("self_attn.q_proj", q_size, HIDDEN),
            ("self_attn.k_proj", kv_size, HIDDEN),
            ("self_attn.v_proj", kv_size, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q_size),
            ("mlp.router", num_experts, HIDDEN),
        ):
            common[f"{layer}.{name}.weight"] = torch.randn(rows, columns) / columns**0.5
            common[f"{layer}.{name}.bias"] = 0.3 * torch.randn(rows)
        common[f"{layer}.self_attn.sinks"] = torch.randn(HEADS)
        for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            experts = f"{layer}.mlp.experts.{name}"
            common[f"{experts}_bias"] = 0.3 * torch.randn(num_experts, rows)
            shape = num_experts, rows, columns // 32
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            scales = torch.randint(121, 126, shape, dtype=torch.uint8)
            packed[f"{experts}_blocks"], packed[f"{experts}_scales"] = blocks, scales
            values[experts] = dequantized(blocks, scales).transpose(1, 2).contiguous()
    config = {**CONFIG, "num_local_experts": num_experts}
    _write(mxfp4, {**config, "quantization_config": MXFP4}, {**common, **packed})
    _write(plain, config, {**common, **values})


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks [..., K / 32, 16] and scales [..., K / 32] -> [..., K], one number after the other."""
    low, high = torch.tensor(VALUES)[(blocks & 15).int()], torch.tensor(VALUES)[(blocks >> 4).int()]
    factors = 2.0 ** (scales.double() - 127)
    return (torch.stack((low, high), -1).flatten(-2) * factors[..., None]).float().flatten(-2)


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
