"""Exports of what is no plain checkpoint: quantized ones, GGUF's blocks, models with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagewire.base.errors import ConfigError
from pagewire.export.config import ExportConfig
from pagewire.export.run import export_hf
from tests.integration.tiny_families import write_tiny
from tests.unit.engine.quantized_checkpoints import write_pair
from tests.unit.engine.test_quantized_models import CASES
from tests.unit.export.models import all_tensors


def exported(model: Path, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    made = export_hf(ExportConfig(model=str(model), out=out, device="cpu", **settings))
    return all_tensors(made.path)


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_checkpoint_becomes_the_numbers_that_it_stands_for(name: str, tmp_path: Path) -> None:
    case, _ = CASES[name]
    quantized, plain = write_pair(tmp_path, case, torch_dtype="float32")
    made, expected = exported(quantized, tmp_path / "made"), load_file(plain / "model.safetensors")
    assert made.keys() == expected.keys()
    for tensor, values in expected.items():
        assert torch.allclose(made[tensor].float(), values.float(), rtol=1e-5, atol=1e-6), tensor
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


KINDS: dict[str, dict[str, Any]] = {
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 20},
        "use_rslora": True,
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all", "lora_bias": False},
    "bias of B": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
    "whole modules": {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


def write_adapter(model: Path, directory: Path, **settings: Any) -> Any:
    """A random adapter, as PEFT saves it. Returns what PEFT makes of the model with it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=10, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 if "magnitude" in name or "modules_to_save" in name else 0.3
            change = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data += change
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    needs_biases = {"attention_bias": True} if "bias" in kind else {}
    model = write_tiny(
        "llama", tmp_path / "model", mlp_bias=False, **{"attention_bias": False, **needs_biases}
    )
    adapted = write_adapter(model, tmp_path / "adapter", **KINDS[kind])
    made = exported(model, tmp_path / "made", merge_lora=str(tmp_path / "adapter"))
    expected = adapted.merge_and_unload().state_dict()
    assert made.keys() == expected.keys()
    changed = 0
    for name, values in expected.items():
        assert torch.allclose(made[name], values, rtol=1e-5, atol=1e-5), name
        changed += not torch.equal(values, load_file(model / "model.safetensors")[name])
    assert changed >= 3


def test_a_tied_projection_stays_where_the_adapter_changes_the_embedding(tmp_path: Path) -> None:
    """As it was while the adapter was trained, when the embedding alone was changed."""
    model = write_tiny("qwen3", tmp_path / "model")
    write_adapter(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    made = exported(model, tmp_path / "made", merge_lora=str(tmp_path / "adapter"))
    before = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(made["lm_head.weight"], before)
    assert not torch.equal(made["model.embed_tokens.weight"], before)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path / "model")
    write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.2.", "layers.9."): each for name, each in tensors.items()}, file)
    with pytest.raises(
        ConfigError, match=r"changes model.layers.9.self_attn.q_proj, which the model does not"
    ):
        exported(model, tmp_path / "made", merge_lora=str(tmp_path / "adapter"))
    smaller = write_tiny("llama", tmp_path / "smaller", hidden_size=32)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"is for a matrix of \[64, 64\], in the model it has \[32, 32\]"):
        exported(smaller, tmp_path / "made", merge_lora=str(tmp_path / "adapter"))
