"""Adapters through the runner for GPUs: interpreted where there is none, and without graphs then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cuda.runner import CudaModelRunner
from engine.dispatch.sampling import SamplingRecord
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_adapters import write_adapter
from tests.integration.tiny_families import VOCAB, write_tiny
from tests.kernels.hopper import compile_overlapping
from tests.kernels.test_cuda_runner import DEVICE, PLATFORM

SAMPLING = SamplingRecord(temperature=0.0, logprobs=3)
SETTINGS = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 16,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "num_blocks": 32,
}
PROMPTS = [[(7 * i + n) % VOCAB for i in range(n)] for n in (5, 1, 19, 6)]


@pytest.mark.slow
def test_tokens_with_adapters_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Three adapters in two slots, one of which changes the embedding and the output projection."""
    base = write_tiny("llama", tmp_path / "base")
    adapters = [
        write_adapter(base, kind, tmp_path / kind, seed=seed)
        for seed, kind in enumerate(("patterns", "dora", "embeddings"))
    ]
    outputs = []
    for settings in ({}, {"make_platform": PLATFORM, "device": DEVICE}):
        driver = CoreDriver(base, **SETTINGS, **settings)  # type: ignore[arg-type]
        for number, adapter in enumerate(adapters, start=1):
            driver.load(number, adapter)
        served = driver.generate(PROMPTS, 3, SAMPLING, [1, 0, 2, 3])
        outputs.append(
            [(request.token_ids.tolist(), [entry.logprob for entry in told]) for request, told in served]
        )
    assert isinstance(driver.runner, CudaModelRunner)
    for (tokens, logprobs), (expected, theirs) in zip(outputs[1], outputs[0], strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(theirs, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_graphs_with_adapters_compute_what_single_launches_do(tmp_path: Path) -> None:
    """In bfloat16, so that one token's shrink is part of its product, and with rows of every count."""
    base = write_tiny("llama", tmp_path / "base")
    adapters = [write_adapter(base, "plain", tmp_path / str(seed), seed=seed) for seed in range(2)]
    told = []
    for eager in (False, True):
        driver = CoreDriver(
            base, **SETTINGS | {"device": "cuda", "dtype": "bfloat16", "enforce_eager": eager}
        )
        runner = driver.runner
        assert isinstance(runner, CudaModelRunner)
        while runner.work_ahead():
            pass
        assert (len(runner.graphs) > 0) != eager
        for number, adapter in enumerate(adapters, start=1):
            driver.load(number, adapter)
        for prompts, ids in ((PROMPTS[:1], [1]), (PROMPTS, [1, 0, 2, 1])):
            for _, entries in driver.generate(prompts, 6, SAMPLING, ids):
                told.append([entry.logprob for entry in entries])
    half = len(told) // 2
    for ours, theirs in zip(told[:half], told[half:], strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


_TILES = ["tokens_ptr", "tile_slot_ptr", "tile_begin_ptr", "tile_end_ptr", "ranks_ptr"]


def test_the_shrink_compiles_for_hopper() -> None:
    signature = dict.fromkeys(["x_ptr", "a_ptr"], "*bf16") | dict.fromkeys(_TILES, "*i32")
    signature |= {"out_ptr": "*fp32", "num_rows": "i32", "x_stride": "i32"}
    constants = {"K": 4096, "PARTS": 3, "R": 32, "BLOCK_M": 16, "BLOCK_R": 32, "BLOCK_K": 128, "SPLIT_K": 4}
    compile_overlapping("engine.kernels.lora.kernel:shrink_kernel", signature, constants, early_reads=_TILES)


def test_the_expand_compiles_for_hopper() -> None:
    signature = {"shrunk_ptr": "*fp32", "b_ptr": "*bf16"} | dict.fromkeys(_TILES, "*i32")
    signature |= {"has_vectors_ptr": "*i32", "gain_ptr": "*fp32", "offset_ptr": "*fp32", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(["num_rows", "n", "out_stride", "size_0", "size_1", "size_2"], "i32")
    constants = {"PARTS": 3, "R": 32, "BLOCK_M": 16, "BLOCK_N": 256, "BLOCK_R": 32, "SPLIT_K": 4}
    compile_overlapping(
        "engine.kernels.lora.kernel:expand_kernel", signature, constants, early_reads=["b_ptr", *_TILES]
    )


def test_one_token_s_kernels_compile_for_hopper() -> None:
    signature = dict.fromkeys(["x_ptr", "w_ptr", "bias_ptr", "out_ptr", "a_ptr"], "*bf16")
    signature |= {"slot_ptr": "*i32", "ranks_ptr": "*i32", "shrunk_ptr": "*fp32", "n": "i32"}
    constants = {"K": 4096, "ROWS": 96, "R": 32, "BLOCK_N": 4, "BLOCK_K": 1024, "HAS_BIAS": True}
    compile_overlapping(
        "engine.kernels.lora.kernel:matrix_vector_shrink_kernel",
        signature,
        constants,
        early_reads=["w_ptr", "a_ptr", "slot_ptr", "ranks_ptr"],
    )
    signature = {"shrunk_ptr": "*fp32", "b_ptr": "*bf16", "slot_ptr": "*i32", "ranks_ptr": "*i32"}
    signature |= {"has_vectors_ptr": "*i32", "gain_ptr": "*fp32", "offset_ptr": "*fp32", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(["n", "size_0", "size_1", "size_2"], "i32")
    compile_overlapping(
        "engine.kernels.lora.kernel:expand_one_kernel",
        signature,
        {"R": 32, "BLOCK_N": 64, "BLOCK_R": 32},
        early_reads=["b_ptr", "slot_ptr", "ranks_ptr", "has_vectors_ptr"],
    )
