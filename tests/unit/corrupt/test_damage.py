"""Whatever is damaged in a model's files, they are read as they are or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.ops import TorchLayerOps
from engine.layers.linear_method import DenseMethod, SameMethod
from engine.layers.parallel import TensorParallel
from engine.loader.checkpoint import open_checkpoint
from engine.loader.load import create_model
from engine.loader.stream import stored_tensors
from engine.loader.weights import load_weights
from engine.models.base import CausalLM, ModelContext
from engine.models.families import FAMILIES, load_model_config
from frontend.text.generation_defaults import load_generation_defaults
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.convert import convert_gguf
from pagewire.hub.model_files import read_json_object
from tests.unit.corrupt.mutations import damage_gguf, damage_json, damage_safetensors, gguf_fields
from tests.unit.corrupt.samples import write_directory, write_gguf
from tests.unit.engine.tiny_model import CONFIG

CPU = torch.device("cpu")
seeds = st.integers(0, 2**64).map(Random)


def examples(count: int) -> Callable[..., object]:
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


def is_refused_by_name(path: Path, read: Callable[[], object]) -> bool:
    """Whether it is refused; fails if the error is of another kind or does not say where it is."""
    try:
        read()
    except ConfigError as error:
        message = error.message
    else:
        return False
    assert str(path) in message
    assert message.isprintable()
    assert len(message) <= 1000
    return True


# What any family reads, each with a value that some of them take.
EVERY_FIELD: dict[str, Any] = {
    **CONFIG,
    "padded_vocab_size": 100,
    "num_layers": 2,
    "n_layer": 2,
    "ffn_hidden_size": 48,
    "seq_length": 64,
    "kv_channels": 8,
    "multi_query_group_num": 2,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "use_sliding_window": True,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 30.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "rope_parameters": {
        "rope_type": "longrope",
        "long_factor": [1.0] * 4,
        "short_factor": [1.0] * 4,
        "full_attention": {"rope_type": "dynamic", "factor": 2.0},
        "sliding_attention": {"rope_theta": 1e4},
    },
    "rope_ratio": 2,
    "logit_scale": 0.1,
    "embedding_multiplier": 2.0,
    "text_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    config = load_model_config(directory)
    backend = TorchAttentionBackend(CPU, torch.float32)
    methods = SameMethod(DenseMethod())
    context = ModelContext(config, 64, backend, TorchLayerOps(CPU), methods, TensorParallel())
    return create_model(context, CPU, torch.float32)


def damaged(path: Path, target: Path, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of a file, damaged."""
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(damage(path.read_bytes()))
    return target


@examples(120)
@given(random=seeds)
def test_weights(directory: Path, model: CausalLM, tmp_path: Path, random: Random) -> None:
    damaged(
        directory / "model.safetensors",
        tmp_path / "model.safetensors",
        lambda data: damage_safetensors(data, random),
    )
    is_refused_by_name(tmp_path, lambda: load_weights(model, open_checkpoint(tmp_path), CPU))


def test_weights_cut_anywhere(directory: Path, model: CausalLM, tmp_path: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    for size in range(0, len(whole), len(whole) // 97):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert is_refused_by_name(
            tmp_path / "model.safetensors", lambda: load_weights(model, open_checkpoint(tmp_path), CPU)
        )


def test_a_flipped_bit_of_a_weight_is_a_weight(directory: Path, model: CausalLM, tmp_path: Path) -> None:
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert not is_refused_by_name(tmp_path, lambda: load_weights(model, open_checkpoint(tmp_path), CPU))
    assert stored_tensors(tmp_path / "model.safetensors")


@examples(200)
@given(random=seeds)
def test_the_index_of_shards(tmp_path: Path, random: Random) -> None:
    for tensor, name in (("x", "a.safetensors"), ("y", "b.safetensors")):
        save_file({tensor: torch.zeros(1)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(damage_json({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}, random))
    if not is_refused_by_name(index, lambda: open_checkpoint(tmp_path)):
        assert {path.parent for path in open_checkpoint(tmp_path).files} == {tmp_path}


@examples(150)
@given(random=seeds)
def test_the_configuration(directory: Path, tmp_path: Path, random: Random) -> None:
    for name in ("config.json", "generation_config.json"):
        content = json.loads((directory / name).read_bytes())
        (tmp_path / name).write_bytes(damage_json(content, random))
    is_refused_by_name(tmp_path, lambda: load_model_config(tmp_path))
    is_refused_by_name(tmp_path, lambda: load_generation_defaults(tmp_path))


@examples(400)
@given(random=seeds)
def test_the_configuration_of_any_family(tmp_path: Path, random: Random) -> None:
    architecture = random.choice(sorted(FAMILIES))
    content = {"architectures": [architecture], **EVERY_FIELD}
    for name in random.sample(sorted(EVERY_FIELD), 4):  # read another way where they are missing
        del content[name]
    path = tmp_path / "config.json"
    path.write_bytes(damage_json(content, random))
    is_refused_by_name(path, lambda: load_model_config(tmp_path))


@examples(150)
@given(random=seeds)
def test_any_other_object(tmp_path: Path, random: Random) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(damage_json({"a": [1, {"b": "c"}], "d": {"e": None}}, random))
    is_refused_by_name(path, lambda: read_json_object(path))


@pytest.mark.parametrize("sentencepiece", [False, True])
@examples(80)
@given(random=seeds)
def test_the_tokenizer(tmp_path_factory: pytest.TempPathFactory, sentencepiece: bool, random: Random) -> None:
    whole = tmp_path_factory.getbasetemp() / f"tokenizer-{sentencepiece}"
    if not whole.exists():
        write_directory(whole, sentencepiece=sentencepiece)
    damaged_dir = tmp_path_factory.getbasetemp() / "damaged-tokenizer"
    path = damaged(
        whole / "tokenizer.json",
        damaged_dir / "tokenizer.json",
        lambda data: damage_json(json.loads(data), random),
    )
    is_refused_by_name(path, lambda: TextTokenizer.load(damaged_dir))


@examples(80)
@given(random=seeds)
def test_gguf(tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    whole = tmp_path_factory.getbasetemp() / "whole.gguf"
    if not whole.exists():
        write_gguf(whole)
    data = whole.read_bytes()
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damage_gguf(data, random, gguf_fields(data)))
    target = tmp_path_factory.getbasetemp() / "converted"
    target.mkdir(exist_ok=True)
    is_refused_by_name(path, lambda: convert_gguf(path, target, progress=False))
