"""Everything about a checkpoint that does not fit its model is one error, before any number is read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.loader import weights as loader
from pagewire.base.errors import ConfigError
from tests.unit.engine.test_loading import runner
from tests.unit.engine.test_torch_files import write_bin_model
from tests.unit.engine.tiny_model import CONFIG, tensors, write_model


def broken_tensors() -> dict[str, torch.Tensor]:
    """Weights with faults of every kind, some of them in every layer."""
    weights = tensors(CONFIG)
    for layer in range(CONFIG["num_hidden_layers"]):
        del weights[f"model.layers.{layer}.self_attn.k_proj.weight"]
        weights[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(8)
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(47, 32)
    del weights["model.layers.1.input_layernorm.weight"]
    weights["model.norm.weight"] = torch.zeros(33)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 48, dtype=torch.int32)
    return weights


@pytest.mark.parametrize("write", [write_model, write_bin_model])
def test_all_faults_are_in_one_error_by_kind(
    tmp_path: Path, write: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(write)
    monkeypatch.setattr(loader, "_load_mapped", lambda *_: pytest.fail("numbers were read"))
    with pytest.raises(ConfigError) as error, caplog.at_level(logging.ERROR):
        runner(write(tmp_path, broken_tensors()))
    said = error.value.message
    assert said.startswith(f"{tmp_path} does not fit the model: it lacks 3 tensors of the model: ")
    assert "model.layers.*.self_attn.k_proj.weight (2)" in said
    assert "model.layers.1.input_layernorm.weight" in said
    assert "2 tensors are not part of this model: model.layers.*.self_attn.q_norm.weight (2)" in said
    assert (
        "each of 2 tensors (model.layers.*.mlp.up_proj.weight (2)) has shape [47, 32]; 48 is needed" in said
    )
    assert "tensor 'model.norm.weight' has shape [33]; [32] is needed" in said
    assert "'model.layers.0.mlp.down_proj.weight' is of int32; floating-point numbers are needed" in said
    assert "lacks model.layers.0.self_attn.k_proj.weight" in caplog.text
    assert "'model.layers.1.self_attn.q_norm.weight' is not part of the model" in caplog.text


def test_a_tensor_of_a_wrong_shape_is_not_missing_too(tmp_path: Path) -> None:
    weights = tensors(CONFIG)
    weights["model.norm.weight"] = torch.zeros(33)
    with pytest.raises(ConfigError) as error:
        runner(write_model(tmp_path, weights))
    assert "lacks" not in error.value.message


def test_a_checkpoint_of_another_model_gives_a_message_of_bounded_length(tmp_path: Path) -> None:
    weights = {
        f"encoder.part{i}.{name}": tensor for i in range(30) for name, tensor in tensors(CONFIG).items()
    }
    with pytest.raises(ConfigError) as error:
        runner(write_model(tmp_path, weights))
    assert "lacks 20 tensors of the model" in error.value.message
    assert "600 tensors are not part of this model" in error.value.message
    assert ", ..." in error.value.message
    assert len(error.value.message) < 800
