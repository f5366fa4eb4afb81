"""Tiny random adapters by PEFT itself, of every kind of configuration, and the models that they make
merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]

# Kind -> LoraConfig's arguments.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "attention": {"r": 4, "target_modules": ATTENTION},
    "all-linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "expression": {"r": 8, "target_modules": r".*\.layers\.[02]\.(self_attn\.[qo]_proj|mlp\.up_proj)"},
    "some layers": {"r": 8, "target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 16, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"k_proj": 24, r"layers\.[01]\.self_attn\.o_proj": 3},
    },
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ALL},
    "lora bias": {"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "biases": {"r": 4, "bias": "all", "target_modules": ALL},
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
}


def write_adapter(base: Path, kind: str, directory: Path, *, seed: int = 0, scale: float = 0.1) -> Path:
    """Writes an adapter of a kind for the model in `base`; every number of it is random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])
    model = get_peft_model(_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + scale * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, scale)
            elif parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return directory


def merged(base: Path, *directories: Path) -> PreTrainedModel:
    """The base with adapters merged into it by PEFT, in fp32."""
    from peft import PeftModel
    from safetensors.torch import load_file

    model: Any = _base(base)
    for directory in directories:
        model = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
        if json.loads((directory / "adapter_config.json").read_text())["bias"] != "none":
            biases = {
                name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
                for name, tensor in load_file(directory / "adapter_model.safetensors").items()
                if name.endswith(".bias")
            }
            _, unexpected = model.load_state_dict(biases, strict=False)
            assert biases
            assert not unexpected
    return model.eval()


def _base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
