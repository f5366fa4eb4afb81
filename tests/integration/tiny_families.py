"""Tiny random checkpoints of many families in the layout of their files, by transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 301
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
_WINDOWS = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# Case -> (model_type, what differs from SHAPE).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": 64,
        },
    ),
    "mistral": ("mistral", {"sliding_window": 13, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 11, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            **_WINDOWS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 12}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 1.0},
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {}),
    "cohere-plus": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {**_WINDOWS, "head_dim": 16}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm-12b": (
        "stablelm",
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    ),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
}

_MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
CASES |= {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13}),
    "qwen2-moe": (
        "qwen2_moe",
        {**_MOE, "shared_expert_intermediate_size": 56, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    ),
    "qwen3-moe": ("qwen3_moe", {**_MOE, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "gpt-oss": (
        "gpt_oss",
        {
            **_WINDOWS,
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "rope_parameters": {**_YARN, "beta_fast": 32.0, "truncate": False},
        },
    ),
}


def write_tiny(case: str, directory: Path, **changes: Any) -> Path:
    """Writes a checkpoint, with `changes` of its configuration, and returns its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type, values = CASES[case]
    config = AutoConfig.for_model(model_type, **{**SHAPE, **values, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        is_norm = name.endswith(("q_norm.weight", "k_norm.weight"))  # may have several heads
        if parameter.dim() == 1 or is_norm:  # transformers makes norms 1 and biases 0
            centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            parameter.data.normal_(centre if "gemma" not in model_type else 0.0, 0.3)
    model.save_pretrained(directory)
    return directory


def reference(directory: Path) -> Callable[[list[int]], torch.Tensor]:
    """What transformers makes of a sequence: its logits, [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> torch.Tensor:
        result: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
        return result

    return logits
