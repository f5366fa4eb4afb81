"""A checkpoint in each quantized format gives the log probabilities of what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.cpu.platform import CpuPlatform
from engine.cpu.runner import CpuModelRunner
from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import SamplingRecord
from engine.layers.linear_method import DenseMethod, LinearMethod, LinearMethods
from engine.quant.layouts.base import Layout, layouts_of
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.table import TableWeights
from tests.integration.plan_driver import PlanDriver
from tests.unit.engine import quantized_checkpoints as files
from tests.unit.engine.quantized_checkpoints import Case, compressed, write_pair
from tests.unit.engine.test_loading import runner

PROMPTS = [[5, 9, 33, 7, 21, 60, 3], [(7 * i + 3) % 64 for i in range(23)]]
SAMPLING = SamplingRecord(temperature=0.0, logprobs=4)
OUTPUT_TOKENS = 6


def logprobs_of(served: CpuModelRunner) -> list[list[TokenLogprobs]]:
    requests = PlanDriver(served).generate(PROMPTS, OUTPUT_TOKENS, SAMPLING)
    return [request.logprobs for request in requests]


def logprobs(directory: Path, **settings: object) -> list[list[TokenLogprobs]]:
    return logprobs_of(runner(directory, **settings))


def assert_alike(first: Path, second: Path, tolerance: float = 1e-4) -> nn.Module:
    """Returns the first model."""
    served = runner(first)
    for ours, theirs in zip(logprobs_of(served), logprobs(second), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert list(one.top_logprobs) == pytest.approx(list(other.top_logprobs), abs=tolerance)
            assert list(one.top_ids) == list(other.top_ids)
    return served.model


def gptq(bits: int, group_size: int, *, symmetric: bool = True, **parts: Any) -> Case:
    described = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric}
    if parts.get("ordered"):
        described["desc_act"] = True
    if parts.get("second_version"):
        described["checkpoint_format"] = "gptq_v2"
    return Case(described, files.gptq(bits, group_size, symmetric=symmetric, **parts))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GROUPS_4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP8_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}

# Every kind of layout, and every reader of files.
CASES: dict[str, tuple[Case, type[Layout]]] = {
    "awq": (Case(AWQ, files.awq(32)), PackedGroups),
    "gptq 4": (gptq(4, 32), PackedGroups),
    "gptq 3, asymmetric, in order": (gptq(3, 32, symmetric=False, ordered=True), PackedGroups),
    "gptq 2, second version": (gptq(2, 16, symmetric=False, second_version=True), PackedGroups),
    "gptq 8, one group": (gptq(8, -1, symmetric=False), Int8Groups),
    "packed 4, asymmetric, in order": (
        Case(
            compressed("pack-quantized", {**GROUPS_4, "symmetric": False, "actorder": "group"}),
            files.packed(4, 32, symmetric=False, ordered=True),
        ),
        PackedGroups,
    ),
    "packed 8": (
        Case(compressed("pack-quantized", CHANNEL_8), files.packed(8, -1, symmetric=True)),
        Int8Groups,
    ),
    "fp8 channels, inputs as they are": (
        Case(compressed("float-quantized", FP8), files.fp8("channel")),
        Fp8Channels,
    ),
    "nf4, double": (
        Case({**NF4, "bnb_4bit_use_double_quant": True}, files.nf4(nested=True)),
        TableWeights,
    ),
    "llm.int8": (Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, files.bnb_int8), Int8Groups),
    "squeezellm 3, sparse": (
        Case({"quant_method": "squeezellm", "wbits": 3}, files.squeezellm(3, sparse=True)),
        TableWeights,
    ),
}


def _variants_of_gptq() -> dict[str, Case]:
    """All that differ in how they are stored."""
    flags = ("symmetric", "second_version", "ordered")
    cases = {}
    for bits, group_size, *chosen in product((2, 3, 4, 8), (32, -1), *[(False, True)] * len(flags)):
        parts = dict(zip(flags, chosen, strict=True))
        if not (parts["ordered"] and group_size < 0):
            name = " ".join(flag for flag in flags if parts[flag])
            cases[f"gptq {bits} {group_size} {name}"] = gptq(bits, group_size, **parts)
    return cases


MORE_CASES: dict[str, Case] = {
    "awq, one group": Case({**AWQ, "group_size": -1}, files.awq(-1)),
    **_variants_of_gptq(),
    "packed 4": Case(compressed("pack-quantized", GROUPS_4), files.packed(4, 32, symmetric=True)),
    "packed 8, asymmetric": Case(
        compressed("pack-quantized", {**GROUPS_4, "num_bits": 8, "symmetric": False}),
        files.packed(8, 32, symmetric=False),
    ),
    "int8, inputs as they are": Case(compressed("int-quantized", CHANNEL_8), files.int8()),
    "fp8 blocks, inputs as they are": Case(
        compressed("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}),
        files.fp8("block"),
    ),
    "nf4": Case(NF4, files.nf4(nested=False)),
    "nf4 whose blocks span rows": Case(
        NF4, files.nf4(nested=False), changes={"hidden_size": 96, "intermediate_size": 40}
    ),
    "squeezellm 4": Case({"quant_method": "squeezellm", "wbits": 4}, files.squeezellm(4, sparse=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_those_of_the_numbers_that_a_checkpoint_stands_for(
    name: str, tmp_path: Path
) -> None:
    case, layout = CASES[name]
    quantized, plain = write_pair(tmp_path, case)
    model = assert_alike(quantized, plain)
    assert [type(each) for each in layouts_of(model)] == [layout] * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_log_probabilities_in_every_variant_of_a_format(name: str, tmp_path: Path) -> None:
    assert_alike(*write_pair(tmp_path, MORE_CASES[name]))


def int8_token(x: torch.Tensor) -> torch.Tensor:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales).round() * scales


def int8_static(x: torch.Tensor) -> torch.Tensor:
    return (x / 0.05).round().clamp(-128, 127) * 0.05


def int8_zero_point(x: torch.Tensor) -> torch.Tensor:
    return ((x / 0.05).round() - 7).clamp(-128, 127).add(7) * 0.05


def fp8_values(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def fp8_token(x: torch.Tensor) -> torch.Tensor:
    scales = x.abs().amax(-1, keepdim=True) / 448
    return fp8_values(x / scales) * scales


def fp8_static(x: torch.Tensor) -> torch.Tensor:
    return fp8_values(x / 0.02) * 0.02


def fp8_groups(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([fp8_token(part) for part in x.split(32, dim=-1)], dim=-1)


INPUT_CASES: dict[str, tuple[Case, Callable[[torch.Tensor], torch.Tensor], type[Layout]]] = {
    "int8 by token": (
        Case(compressed("int-quantized", CHANNEL_8, TOKENS_8), files.int8()),
        int8_token,
        Int8Channels,
    ),
    "int8 static": (
        Case(
            compressed("int-quantized", {**CHANNEL_8, "strategy": "tensor"}, STATIC_8),
            files.int8(per_tensor=True, static=True),
        ),
        int8_static,
        Int8Channels,
    ),
    "int8 static with a zero point": (
        Case(
            compressed("int-quantized", CHANNEL_8, {**STATIC_8, "symmetric": False}),
            files.int8(static=True, zero_point=True),
        ),
        int8_zero_point,
        Int8Channels,
    ),
    "fp8 by token": (
        Case(compressed("float-quantized", FP8, FP8_TOKENS), files.fp8("channel")),
        fp8_token,
        Fp8Channels,
    ),
    "fp8 static": (
        Case(
            {"quant_method": "fp8", "activation_scheme": "static"},
            files.fp8("tensor", static=True),
        ),
        fp8_static,
        Fp8Channels,
    ),
    "fp8 blocks": (Case(BLOCKS, files.fp8("block", name="weight_scale_inv")), fp8_groups, Fp8Blocks),
}


class WithQuantizedInputs(DenseMethod):
    """Plain weights whose inputs are rounded as a format rounds them."""

    def __init__(self, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._rounded = rounded

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(self._rounded(x), layer.weight, bias)


class AllButTheHead(LinearMethods):
    def __init__(self, method: LinearMethod) -> None:
        self._method = method

    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        return DenseMethod() if layer == "lm_head" else self._method


@pytest.mark.parametrize("name", INPUT_CASES)
def test_inputs_are_rounded_as_the_format_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding differently changes is far more than the tolerance, for most tokens. For a few the last
    bit of a sum decides how an input is rounded."""
    case, rounded, layout = INPUT_CASES[name]
    quantized, plain = write_pair(tmp_path, case)
    served = runner(quantized)
    ours = logprobs_of(served)
    assert {type(each) for each in layouts_of(served.model)} == {layout}
    methods = AllButTheHead(WithQuantizedInputs(rounded))
    monkeypatch.setattr(CpuPlatform, "linear_methods", lambda self: methods)
    theirs = logprobs(plain)
    alike = [
        list(mine.top_logprobs) == pytest.approx(list(its.top_logprobs), abs=0.02)
        for one, other in zip(ours, theirs, strict=True)
        for mine, its in zip(one, other, strict=True)
    ]
    assert sum(alike) >= 0.75 * len(alike)
