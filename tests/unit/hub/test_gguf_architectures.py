"""A GGUF file of any supported architecture becomes the checkpoint that it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from engine.models.families import FAMILIES, load_model_config
from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.architectures import ARCHITECTURES
from pagewire.hub.gguf.convert import convert_gguf
from tests.unit.corrupt.mutations import damage_gguf, gguf_fields
from tests.unit.hub.gguf_checkpoints import (
    CASES,
    PLAIN,
    Case,
    Tensors,
    stems,
    write_checkpoint,
    write_gguf,
)

# What says nothing about the model.
SAYS_NOTHING = {
    *("_name_or_path", "initializer_range", "head_dim", "architectures", "model_type"),
    "quantization_config",
}
QUANTIZED_CASES = ("llama", "mixtral", "phi3", "gemma", "baichuan")


def convert(path: Path, directory: Path) -> tuple[dict[str, Any], Tensors]:
    directory.mkdir()
    convert_gguf(path, directory, progress=False, dequantized=True)
    config = json.loads((directory / "config.json").read_text())
    return config, load_file(directory / "model.safetensors")


@dataclass(frozen=True)
class Converted:
    """A checkpoint, the GGUF file of which was converted."""

    case: Case
    original: Path
    config: dict[str, Any]
    tensors: Tensors
    directory: Path


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    case, root = CASES[request.param], tmp_path_factory.mktemp(request.param)
    config, tensors = write_checkpoint(case, root / "original")
    write_gguf(case, config, tensors, root / "tiny.gguf")
    convert(root / "tiny.gguf", root / "converted")
    return Converted(case, root / "original", config, tensors, root / "converted")


def test_a_converted_file_has_the_tensors_that_it_was_made_from(converted: Converted) -> None:
    weights = load_file(converted.directory / "model.safetensors")
    assert weights.keys() == converted.tensors.keys()
    for tensor, values in converted.tensors.items():
        assert weights[tensor].shape == values.shape, tensor
        assert np.array_equal(weights[tensor], values), tensor


def test_the_engine_reads_the_same_configuration(converted: Converted) -> None:
    original = load_model_config(converted.original)
    read = load_model_config(converted.directory)
    assert FAMILIES[read.architecture].names == FAMILIES[original.architecture].names
    assert replace(read, architecture=original.architecture) == original


def test_transformers_reads_the_same_configuration(converted: Converted) -> None:
    if converted.case.model_type in PLAIN | {"mistral"}:
        pytest.skip("transformers has no such model, or GGUF calls it otherwise")
    transformers = pytest.importorskip("transformers", minversion="5")

    original, read = (
        transformers.AutoConfig.from_pretrained(directory).to_dict()
        for directory in (converted.original, converted.directory)
    )
    for field in original.keys() - SAYS_NOTHING:
        assert read[field] == original[field], field


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

    def take_apart(writer: gguf.GGUFWriter, tensors: Tensors) -> None:
        for name in [name for name in tensors if "_exps" in name]:
            for expert, values in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps", f".{expert}")] = values

    case = CASES["mixtral"]
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf", edit=take_apart)
    _, weights = convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert weights.keys() == tensors.keys()
    assert all(np.array_equal(weights[name], values) for name, values in tensors.items())


def test_packed_experts_are_to_transformers_what_ggml_takes_them_for(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case, given = CASES["gpt-oss"], {}
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf", edit=lambda writer, made: given.update(made))
    _, weights = convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    prefix = "model.layers.1.mlp.experts.down_proj"
    ours = convert_moe_packed_tensors(
        *(torch.from_numpy(weights[f"{prefix}_{part}"]) for part in ("blocks", "scales")), dtype=torch.float32
    )
    theirs = gguf.quants.dequantize(given["blk.1.ffn_down_exps.weight"], GGMLQuantizationType.MXFP4)
    assert np.array_equal(ours.transpose(1, 2).numpy(), theirs)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_damaged_mixture_of_experts_is_converted_or_refused_by_name(name: str, tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "converted"
    write_gguf(CASES[name], *write_checkpoint(CASES[name], tmp_path / "original"), path)
    out.mkdir()
    data = path.read_bytes()
    fields = gguf_fields(data)

    @settings(max_examples=30)
    @given(random=st.integers(0, 2**64).map(Random))
    def check(random: Random) -> None:
        path.write_bytes(damage_gguf(data, random, fields))
        try:
            convert_gguf(path, out, progress=False)
        except ConfigError as error:
            message = error.message
        else:
            return
        assert str(path) in message
        assert message.isprintable()

    check()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_have_names_that_the_gguf_package_knows(architecture: str) -> None:
    row = ARCHITECTURES[architecture]
    [arch] = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    named = {*row.outer, *row.layer, *(tensor for tensors in row.fused.values() for tensor in tensors)}
    named |= {f"{tensor}_exps" for tensor in row.experts} | {*sum(row.packed.values(), ())}
    # These have a head of their own in a few files only.
    assert named - stems(arch) <= {"output"}
