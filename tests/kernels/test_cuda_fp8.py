"""FP8 through the runner for GPUs: weights of every FP8 format, and keys and values of 8 bits. Interpreted it
takes long: `make test-all`, or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.cpu.platform import CpuPlatform
from engine.cpu.runner import CpuModelRunner
from engine.cuda import shared_prefix
from engine.cuda.fp8_experts import CudaFp8Experts
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import NewRequest, StepResult, TokenLogprobs
from engine.dispatch.sampling import SamplingRecord, u32
from engine.layers.linear_method import DenseMethod, SameMethod
from engine.quant.layouts.base import Layout
from engine.quant.products import LayoutProducts
from engine.worker.build import build_worker
from pagewire.base.errors import ConfigError
from tests.kernels.test_cuda_runner import DEVICE, InterpretedPlatform, config
from tests.kernels.test_cuda_shared_prefix import BLOCKS, NUM_DECODES, PROMPTS, launch_all, plan
from tests.unit.engine.quantized_checkpoints import write_pair
from tests.unit.engine.test_quantized_models import CASES, INPUT_CASES
from tests.unit.engine.tiny_model import write_model

SAMPLING = SamplingRecord(temperature=0.0, logprobs=3)
# Of a token's product, relative to the largest one; sums of the tensor cores have 14 bits.
PRODUCT_ERROR = 2e-3 if torch.cuda.is_available() else 1e-5
# Of all tokens' products. An input that is between two numbers of e4m3 may become either.
MOST_DIFFERING = 0.01
# Of log probabilities, at most, where nothing rounds inputs.
WEIGHTS_ERROR = 0.02
# Of log probabilities of 0 to -10 in the mean, whose logits are those of tiny random models.
KV_ERROR = 0.1


def runner_of(directory: Path, **options: Any) -> CudaModelRunner:
    runner = build_worker(config(directory, DEVICE, **options), InterpretedPlatform).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


def differences(ours: list[StepResult], theirs: list[StepResult]) -> np.ndarray:
    """Of the log probabilities of each step's likeliest tokens."""
    pairs = [
        (told.top_logprobs, wanted.top_logprobs)
        for one, other in zip(ours, theirs, strict=True)
        for told, wanted in zip(one.logprobs.values(), other.logprobs.values(), strict=True)
    ]
    found: np.ndarray = np.abs(np.array([np.array(one) - np.array(other) for one, other in pairs]))
    return found


def launch_the_last(runner: CudaModelRunner) -> list[StepResult]:
    """What `launch_all` does of the last of its requests, which shares nothing with the others."""
    runner.reset()
    length = len(PROMPTS[-1])
    request = NewRequest(0, u32(PROMPTS[-1]), length, u32(BLOCKS[-1]), SAMPLING)
    steps = [plan(0, [0], [length], request)]
    steps += [plan(1 + i, [length + i], [1]) for i in range(NUM_DECODES)]
    return [runner.launch(step).result() for step in steps]


def last_of(steps: list[StepResult]) -> list[TokenLogprobs]:
    """Of each step's last request."""
    return [list(step.logprobs.values())[-1] for step in steps]


class ComparedProducts:
    """What products make of their inputs beside what the layouts' own arithmetic does.

    Log probabilities would not do: sums of the tensor cores differ by their last bits, and wherever that
    makes an input of the next layer another number of e4m3 it differs by a sixteenth. With such sums on a CPU
    these models' log probabilities differ by 0.05 in the mean, and by 0.5 or more at most.
    """

    def __init__(self) -> None:
        self.errors: list[torch.Tensor] = []

    def multiply(
        self, products: LayoutProducts, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        own = MULTIPLY(products, layout, x, bias)
        expected = layout.multiply(x, bias)
        largest = expected.abs().amax().clamp(min=1e-6)
        self.errors.append((own - expected).abs().amax(1) / largest)
        return own

    def assert_close(self, num_products: int) -> None:
        """Of a run with so many products."""
        assert len(self.errors) == num_products
        assert (torch.cat(self.errors) > PRODUCT_ERROR).float().mean() < MOST_DIFFERING


MULTIPLY = LayoutProducts.multiply


# Two layers of four matrices.
NUM_MATRICES = 8


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> ComparedProducts:
    products = ComparedProducts()
    monkeypatch.setattr(LayoutProducts, "multiply", lambda *operands: products.multiply(*operands))
    return products


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 by token", "fp8 blocks", "fp8 static"])
def test_every_product_of_a_model_is_the_layouts(
    name: str, tmp_path: Path, compared: ComparedProducts
) -> None:
    quantized, _ = write_pair(tmp_path, INPUT_CASES[name][0])
    steps = launch_all(runner_of(quantized), SAMPLING)
    compared.assert_close(NUM_MATRICES * len(steps))


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_cpu_runner(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, CASES["fp8 channels, inputs as they are"][0])
    reference = build_worker(config(quantized, "cpu"), CpuPlatform).runner
    assert isinstance(reference, CpuModelRunner)
    ours, theirs = launch_all(runner_of(quantized), SAMPLING), launch_all(reference, SAMPLING)
    assert differences(ours, theirs).max() < WEIGHTS_ERROR


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), head_dim=16, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def runner(directory: Path) -> CudaModelRunner:
    """Keys and values of 8 bits."""
    made = build_worker(config(directory, DEVICE, kv_cache_dtype="fp8"), InterpretedPlatform)
    assert made.facts.kv_cache_dtype == "float8_e4m3fn"
    assert isinstance(made.runner, CudaModelRunner)
    return made.runner


@pytest.mark.slow
def test_keys_and_values_of_8_bits_change_log_probabilities_by_little(
    directory: Path, runner: CudaModelRunner
) -> None:
    plain = runner_of(directory)
    assert runner.kv_pool.blocks.nbytes * 4 == plain.kv_pool.blocks.nbytes
    ours, theirs = launch_all(runner, SAMPLING), launch_all(plain, SAMPLING)
    # Later steps may go on with other tokens.
    assert 0 < differences(ours[:1], theirs[:1]).mean() < KV_ERROR


@pytest.mark.slow
def test_a_prefix_that_is_read_once_gives_the_same(
    runner: CudaModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = launch_all(runner, SAMPLING)
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)
    assert differences(launch_all(runner, SAMPLING), apart).max() < 1e-4


@pytest.mark.slow
def test_the_checkpoints_scales_of_keys_and_values_are_used(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, CASES["fp8 channels, inputs as they are"][0])
    unscaled = launch_all(runner_of(quantized, kv_cache_dtype="fp8_e4m3"), SAMPLING)
    path = quantized / "model.safetensors"
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor([value])
        for layer, name, value in ((0, "k_scale", 0.5), (0, "v_scale", 0.25), (1, "k_proj.output_scale", 2.0))
    }
    save_file({**load_file(path), **scales}, path)
    runner = runner_of(quantized, kv_cache_dtype="fp8_e4m3")
    found = [layer.scales.tolist() for layer in runner.kv_pool.layers if layer.scales is not None]
    assert found == [[0.5, 0.25], [2.0, 1.0]]
    # Powers of two change nothing but the smallest numbers.
    assert differences(launch_all(runner, SAMPLING)[:1], unscaled[:1]).max() < WEIGHTS_ERROR


@pytest.mark.slow
def test_fp8_weights_are_deterministic(tmp_path: Path, compared: ComparedProducts) -> None:
    quantized, _ = write_pair(tmp_path, INPUT_CASES["fp8 by token"][0])
    runner = runner_of(quantized, deterministic=True)
    together = launch_all(runner, SAMPLING)
    compared.assert_close(NUM_MATRICES * len(together))
    for alone, among_others in zip(last_of(launch_the_last(runner)), last_of(together), strict=True):
        assert list(alone.top_ids) == list(among_others.top_ids)
        assert list(alone.top_logprobs) == list(among_others.top_logprobs)


def test_fp8_weights_whose_inputs_are_not_quantized_are_not_deterministic(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, CASES["fp8 channels, inputs as they are"][0])
    with pytest.raises(ConfigError, match=r"not available with FP8 weights whose inputs are not"):
        runner_of(quantized, deterministic=True)


def test_experts_of_e4m3_need_a_gpu_that_has_it() -> None:
    with pytest.raises(
        ConfigError, match=r"experts are in FP8, which needs a GPU of compute capability 8\.9"
    ):
        CudaFp8Experts(deterministic=False, available=False).for_matrices(SameMethod(DenseMethod()))


def test_a_cpu_refuses_keys_and_values_of_8_bits(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8', which needs a GPU"):
        build_worker(config(directory, "cpu", kv_cache_dtype="fp8"), CpuPlatform)
