"""A GGUF file of any supported architecture becomes the checkpoint that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from safetensors.numpy import load_file

from engine.models.families import FAMILIES, load_model_config
from pagewire.base.errors import ConfigError
from pagewire.hub.gguf_architectures import ARCHITECTURES
from pagewire.hub.gguf_convert import convert_gguf
from tests.unit.hub.gguf_checkpoints import CASES, Tensors, Writer, stems, write_checkpoint, write_gguf

# What the converted config.json may say otherwise.
MEANS_THE_SAME = {
    "architectures",  # Mistral is Llama here, and Baichuan 1 Baichuan 2
    "model_type",
    "head_dim",  # given where the original leaves it to a rule
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "vocab_size",
    "hidden_act",
}
QUANTIZED_CASES = ("llama", "mixtral", "phi3", "gemma", "baichuan")


def convert(path: Path, directory: Path) -> tuple[dict[str, Any], Tensors]:
    directory.mkdir()
    convert_gguf(path, directory, progress=False)
    config = json.loads((directory / "config.json").read_text())
    return config, load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_is_the_checkpoint_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf")
    converted, weights = convert(tmp_path / "tiny.gguf", tmp_path / "converted")

    assert weights.keys() == tensors.keys()
    for tensor, values in tensors.items():
        assert weights[tensor].shape == values.shape, tensor
        assert np.array_equal(weights[tensor], values), tensor
    for key in converted.keys() & config.keys() - MEANS_THE_SAME:
        assert converted[key] == config[key], key
    [architecture] = converted["architectures"]
    if architecture in FAMILIES:
        original = load_model_config(tmp_path / "original")
        read = load_model_config(tmp_path / "converted")
        ours, theirs = FAMILIES[architecture], FAMILIES[original.architecture]
        assert (ours.names, ours.model) == (theirs.names, theirs.model)
        for field in type(read).__slots__:
            if field != "architecture":
                assert getattr(read, field) == getattr(original, field), field


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_converted_configuration(name: str, tmp_path: Path) -> None:
    """As it reads the original one."""
    case = CASES[name]
    if case.model_type in ("qwen1", "chatglm3", "baichuan-7b"):
        pytest.skip("transformers has no such model")
    from transformers import AutoConfig

    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    original = AutoConfig.from_pretrained(tmp_path / "original").to_dict()
    converted = AutoConfig.from_pretrained(tmp_path / "converted").to_dict()
    assert converted == original


@pytest.mark.parametrize("name", QUANTIZED_CASES)
def test_quantized_matrices_are_dequantized_where_they_belong(name: str, tmp_path: Path) -> None:
    case, kind = CASES[name], GGMLQuantizationType.Q8_0
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf", kind=kind)
    _, weights = convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    for tensor, values in tensors.items():
        if values.ndim > 1:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        assert np.array_equal(weights[tensor], values), tensor


def test_experts_in_tensors_of_their_own_are_read_as_well(tmp_path: Path) -> None:
    """As in the first files of Mixtral."""

    def take_apart(writer: Writer, tensors: Tensors) -> None:
        for name in [name for name in tensors if "_exps" in name]:
            for expert, values in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps", f".{expert}")] = values

    case = CASES["mixtral"]
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf", edit=take_apart)
    _, weights = convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert weights.keys() == tensors.keys()
    assert all(np.array_equal(weights[name], values) for name, values in tensors.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_have_names_that_the_gguf_package_knows(architecture: str) -> None:
    row = ARCHITECTURES[architecture]
    [arch] = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    named = {*row.outer, *row.layer, *(tensor for tensors in row.fused.values() for tensor in tensors)}
    named |= {f"{tensor}_exps" for tensor in row.experts}
    # These have a head of their own in a few files only.
    assert named - stems(arch) <= {"output"}
