"""Quantized weights by the native kernels, against the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.cpu.kernels.build import BuildError
from engine.cpu.native import open_native
from engine.cpu.native_layouts import NativeGroups
from engine.cpu.runner import CpuModelRunner
from engine.quant.layouts.base import layouts_of
from engine.quant.layouts.groups import PackedGroups
from engine.quant.layouts.table import TableWeights
from tests.unit.engine import quantized_checkpoints as files
from tests.unit.engine.quantized_checkpoints import CONFIG, Case, compressed, write_pair
from tests.unit.engine.test_loading import runner
from tests.unit.engine.test_quantized_layers import MIXTRAL, MIXTURES, mixtral, write_both
from tests.unit.engine.test_quantized_models import (
    AWQ,
    CASES,
    CHANNEL_8,
    GROUPS_4,
    TOKENS_8,
    gptq,
    logprobs_of,
)
from tests.unit.engine.tiny_model import write_model

NATIVE: dict[str, Case] = {
    "awq": CASES["awq"][0],
    "awq, one group": Case({**AWQ, "group_size": -1}, files.awq(-1)),
    "gptq 3, asymmetric, in order": CASES["gptq 3, asymmetric, in order"][0],
    "gptq 8, asymmetric": gptq(8, 32, symmetric=False),
    "packed 4": Case(compressed("pack-quantized", GROUPS_4), files.packed(4, 32, symmetric=True)),
    "packed 8": CASES["packed 8"][0],
    "int8, inputs as they are": Case(compressed("int-quantized", CHANNEL_8), files.int8()),
    "llm.int8": CASES["llm.int8"][0],
}
# What rounding activations to 8 bits may change of a log probability of these models.
TOLERANCE = 0.25
# Inputs in 8 bits, as the checkpoint asks for: other numbers than those of the weights alone.
W8A8 = Case(compressed("int-quantized", CHANNEL_8, TOKENS_8), files.int8())


@pytest.fixture(scope="module", autouse=True)
def native_kernels() -> None:
    try:
        open_native()
    except BuildError as error:
        pytest.skip(str(error))


def errors(served: CpuModelRunner, exact: CpuModelRunner) -> np.ndarray:
    """By how much log probabilities of the first token differ: later ones may be of other sequences."""
    pairs = zip(logprobs_of(served), logprobs_of(exact), strict=True)
    return np.array([abs(ours[0].top_logprobs[0] - theirs[0].top_logprobs[0]) for ours, theirs in pairs])


def assert_same_numbers(served: CpuModelRunner, exact: CpuModelRunner) -> None:
    """Each matrix stands for what the reference's does, and is native."""
    ours, theirs = list(layouts_of(served.model)), list(layouts_of(exact.model))
    assert {type(each) for each in ours} == {NativeGroups}
    for one, other in zip(ours, theirs, strict=True):
        order = one.order if isinstance(one, NativeGroups) else None
        expected = other.weight()
        if order is not None:
            expected = expected[:, order]
        torch.testing.assert_close(one.rows(0, one.out_features), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*NATIVE, "w8a8"])
def test_log_probabilities_are_those_of_the_numbers_up_to_the_rounding_of_activations(
    name: str, tmp_path: Path
) -> None:
    quantized, plain = write_pair(tmp_path, W8A8 if name == "w8a8" else NATIVE[name])
    served = runner(quantized, dtype="auto")
    assert_same_numbers(served, runner(quantized))
    assert errors(served, runner(plain)).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_quantized_at_load_are_native(kind: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, **CONFIG)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({name: each.bfloat16() for name, each in tensors.items()}, path, metadata={"format": "pt"})
    served, exact = (runner(directory, dtype=dtype, quantization=kind) for dtype in ("auto", "float32"))
    assert_same_numbers(served, exact)
    assert errors(served, exact).max() < TOLERANCE
    assert served.recorded is not None
    assert served.recorded.sizes, "steps of one token are recorded"


@pytest.mark.parametrize(
    ("name", "layout"), [("gptq 2, second version", PackedGroups), ("nf4, double", TableWeights)]
)
def test_what_no_kernel_has_is_multiplied_by_torch(name: str, layout: type, tmp_path: Path) -> None:
    """Groups that are no whole blocks, and tables."""
    quantized, plain = write_pair(tmp_path, CASES[name][0])
    served = runner(quantized, dtype="auto")
    assert {type(each) for each in layouts_of(served.model)} == {layout}
    assert errors(served, runner(plain)).max() < 1e-4


def test_quantized_experts_are_native(tmp_path: Path) -> None:
    quantized, plain = write_both(tmp_path, MIXTURES["gptq"], mixtral(), MIXTRAL, {})
    served = runner(quantized, dtype="auto")
    assert NativeGroups in {type(each) for each in layouts_of(served.model)}
    assert errors(served, runner(plain)).max() < TOLERANCE
