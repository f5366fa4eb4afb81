"""Tiny random classifiers and decoders without a head, in the files that transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integration.tiny_families import SHAPE

# Case -> (model_type, what differs from SHAPE).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 13}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 11}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 11}),
    "phi3": ("phi3", {"sliding_window": 12}),
    "glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "olmo2": ("olmo2", {}),
}


def write_classifier(case: str, directory: Path, **values: Any) -> Any:
    """Writes a classifier and returns transformers' own, in float32."""
    from transformers import AutoModelForSequenceClassification

    return _write(AutoModelForSequenceClassification, case, directory, values)


def write_backbone(case: str, directory: Path, **values: Any) -> Any:
    """Writes a decoder without a head and returns transformers' own, in float32."""
    from transformers import AutoModel

    return _write(AutoModel, case, directory, values)


def _write(auto: Any, case: str, directory: Path, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    model_type, own = FAMILIES[case]
    config = AutoConfig.for_model(model_type, **{**SHAPE, **own, **values})
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # transformers makes norms 1 and biases 0
            centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            parameter.data.normal_(centre if "gemma" not in model_type else 0.0, 0.3)
    model.save_pretrained(directory)
    return model
