"""Quantized models by the GPU's kernels: the results are those of the runner for CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cpu.platform import CpuPlatform
from engine.cuda.expert_method import CudaExperts
from engine.cuda.quantized_experts import CudaQuantizedExperts
from engine.dispatch.sampling import SamplingRecord
from engine.kernels.quantized.words import WordMatrix
from engine.layers.experts import Experts
from engine.quant.layouts.base import layouts_of
from engine.quant.layouts.tiles import WordTiles
from engine.worker.build import build_worker
from pagewire.base.errors import ConfigError
from tests.kernels.test_cuda_runner import DEVICE, InterpretedPlatform, config
from tests.kernels.test_cuda_shared_prefix import launch_all
from tests.unit.engine.quantized_checkpoints import write_both, write_pair
from tests.unit.engine.test_quantized_layers import MIXTRAL, MIXTURES, mixtral
from tests.unit.engine.test_quantized_models import CASES

SAMPLING = SamplingRecord(temperature=0.0, logprobs=3)


def assert_alike(quantized: Path, plain: Path, tolerance: float, **settings: object) -> object:
    """Returns the model."""
    reference = build_worker(config(plain, "cpu"), CpuPlatform).runner
    runner = build_worker(config(quantized, DEVICE, **settings), InterpretedPlatform).runner
    for ours, expected in zip(launch_all(runner, SAMPLING), launch_all(reference, SAMPLING), strict=True):
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        for told, wanted in zip(ours.logprobs.values(), expected.logprobs.values(), strict=True):
            assert list(told.top_logprobs) == pytest.approx(list(wanted.top_logprobs), abs=tolerance)
    return runner.model


@pytest.mark.slow  # test_quantized_kernels.py multiplies by them
def test_integers_in_an_order_of_their_own(tmp_path: Path) -> None:
    case, _ = CASES["packed 4, asymmetric, in order"]
    model = assert_alike(*write_pair(tmp_path, case), 1e-4)
    assert {type(layout) for layout in layouts_of(model)} == {WordTiles}


@pytest.mark.slow  # and multiplies by these
def test_experts_of_integers(tmp_path: Path) -> None:
    model = assert_alike(*write_both(tmp_path, MIXTURES["gptq"], mixtral(), MIXTRAL, {}), 1e-4)
    [first, _] = [module for module in model.modules() if isinstance(module, Experts)]
    assert isinstance(first.method, CudaQuantizedExperts)
    assert isinstance(first.gate_up_proj.words, WordMatrix)
    assert not list(first.parameters())


@pytest.mark.slow  # test_experts.py computes plain experts
def test_experts_that_a_quantized_model_has_in_full_precision(tmp_path: Path) -> None:
    model = assert_alike(*write_both(tmp_path, MIXTURES["gptq"], mixtral(), MIXTRAL, {"experts": None}), 1e-4)
    [first, _] = [module for module in model.modules() if isinstance(module, Experts)]
    assert isinstance(first.method._plain, CudaExperts)
    assert first.gate_up_proj.weight.shape == (4, 192, 64)


@pytest.mark.parametrize("others", [{"experts.2": None}, {"experts.1.w3": None}], ids=str)
def test_experts_of_several_formats_need_a_cpu(others: dict[str, None], tmp_path: Path) -> None:
    quantized, _ = write_both(tmp_path, MIXTURES["gptq"], mixtral(), MIXTRAL, others)
    with pytest.raises(
        ConfigError, match=r"gate_up_proj: on a GPU the quantized experts .* use --device cpu"
    ):
        build_worker(config(quantized, DEVICE), InterpretedPlatform)


def test_experts_of_8_bit_floats_whose_inputs_are_not_quantized_need_a_cpu(tmp_path: Path) -> None:
    quantized, _ = write_both(tmp_path, MIXTURES["fp8"], mixtral(), MIXTRAL, {})
    with pytest.raises(ConfigError, match=r"in FP8 with quantized activations, .* use --device cpu"):
        build_worker(config(quantized, DEVICE), InterpretedPlatform)
