"""The bundled shapes are the models they are named after, and the figures to beat know them."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import WorkerConfig
from engine.models.families import load_model_config
from pagewire.bench.shapes import SHAPES, shape_directory
from pagewire.bench.targets import peer, settings, startup_targets, throughput_targets
from pagewire.bench.workloads import NAMED

ROOT = Path(__file__).resolve().parents[3]
# Parameters as published (tied embeddings counted once).
PARAMETERS = {
    "llama8b": 8_030_261_248,
    "qwen06b": 596_049_920,
    "mixtral8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
MEASURED = ("llama8b", "qwen06b")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    directory = shape_directory(name)
    assert directory is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_the_engine_reads_the_shapes_as_they_were_published() -> None:
    llama, qwen = (load_model_config(shape_directory(name) or Path()) for name in MEASURED)
    assert (llama.architecture, qwen.architecture) == ("LlamaForCausalLM", "Qwen3ForCausalLM")
    assert (llama.num_hidden_layers, llama.num_attention_heads, llama.num_key_value_heads) == (32, 32, 8)
    assert (qwen.num_hidden_layers, qwen.num_attention_heads, qwen.num_key_value_heads) == (28, 16, 8)
    assert (llama.head_dim, qwen.head_dim) == (128, 128)
    assert [config.rotaries[0].theta for config in (llama, qwen)] == [500_000, 1_000_000]
    scaling = llama.rotaries[0].scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("llama3", 8)
    assert qwen.rotaries[0].scaling is None
    assert (llama.norm.eps, qwen.norm.eps) == (1e-5, 1e-6)
    assert (llama.max_position_embeddings, qwen.max_position_embeddings) == (131_072, 40_960)
    assert (llama.tie_word_embeddings, qwen.tie_word_embeddings) == (False, True)


def test_the_engine_reads_the_experts_of_the_shapes() -> None:
    shapes = [load_model_config(shape_directory(name) or Path()) for name in ("mixtral8x7b", "qwen3-30b-a3b")]
    experts = [layer.experts for config in shapes for layer in set(config.layers)]
    read = [each and (each.num_experts, each.top_k, each.intermediate_size) for each in experts]
    assert read == [(8, 2, 14336), (128, 8, 768)]
    assert [config.num_hidden_layers for config in shapes] == [32, 48]


def test_a_directory_of_that_name_goes_before_the_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shape_directory("llama8b") is not None
    (tmp_path / "llama8b").mkdir()
    assert shape_directory("llama8b") is None
    assert shape_directory("smollm2-135m") is None


def test_everything_that_is_no_code_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["pagewire"] for path in (ROOT / "pagewire").glob(pattern)}
    files = [Path(folder, name) for folder, _, names in os.walk(ROOT / "pagewire/bench") for name in names]
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert len(data) == 5
    assert data <= packaged


def test_there_is_a_figure_to_beat_for_every_workload_and_start() -> None:
    for shape in MEASURED:
        for name in NAMED:
            target = throughput_targets(shape, name)
            assert 0 < target["peer"] < target["goal"]
        starts = startup_targets(shape)
        assert all(0 < starts[kind]["goal"] < starts[kind]["peer"] for kind in ("cold", "warm"))
    assert throughput_targets("smollm2-135m", "W1") == {}
    assert throughput_targets("llama8b", "custom") == {}
    assert startup_targets("smollm2-135m") == {}
    assert json.dumps(peer())
    WorkerConfig(model="m", socket=Path("s"), **settings())
