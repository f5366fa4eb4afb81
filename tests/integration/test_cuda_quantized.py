"""Checkpoints of integers and tables through the kernels: the log probabilities are those of the numbers that
they stand for, computed by the CPU. Needs a GPU: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import SamplingRecord
from engine.quant.layouts.base import layouts_of
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.tiles import WordTiles
from tests.integration.core_driver import CoreDriver
from tests.unit.engine import quantized_checkpoints as files
from tests.unit.engine.quantized_checkpoints import CONFIG, Case, write_both, write_pair
from tests.unit.engine.test_quantized_layers import MIXTRAL, MIXTURES, mixtral
from tests.unit.engine.test_quantized_models import AWQ, CASES, INPUT_CASES
from tests.unit.engine.tiny_model import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# Few enough for tiles, and so many in one step that weights are dequantized first.
PROMPTS = [
    [5, 9, 33, 7, 21, 60, 3],
    [(7 * i + 3) % 64 for i in range(23)],
    [(5 * i) % 61 for i in range(190)],
]
SAMPLING = SamplingRecord(temperature=0.0, logprobs=4)
OUTPUT_TOKENS = 4
BOUNDS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 256}
# Of these tiny models, plain, a CPU that computes in 16 bits differs from itself in fp32 by up to 0.045 in
# fp16 and 0.53 in bf16: twice that. Each kernel alone is held to its rounding in tests/kernels.
TOLERANCE = {"float32": 1e-3, "float16": 0.09, "bfloat16": 1.0}
# Numbers that are rounded to 8 or 4 bits may fall on the other side of a tie, which only fp32 makes rare.
ROUNDED_TOLERANCE = 0.01
WIDE = {"hidden_size": 256, "intermediate_size": 384}

FORMATS: dict[str, Case] = {
    **{name: case for name, (case, _) in CASES.items() if "fp8" not in name},
    **{name: case for name, (case, *_) in INPUT_CASES.items() if "int8" in name},
    "awq, groups of 128": Case({**AWQ, "group_size": 128}, files.awq(128), changes=WIDE),
}


def logprobs(directory: Path, device: str, dtype: str, **settings: Any) -> list[list[TokenLogprobs]]:
    driver = CoreDriver(directory, device=device, dtype=dtype, **{**BOUNDS, **settings})
    if device == "cuda":
        assert isinstance(driver.runner, CudaModelRunner)
        layouts = {type(layout) for layout in layouts_of(driver.runner.model)}
        assert layouts <= {WordTiles, Int8Channels}
    return [told for _, told in driver.generate(PROMPTS, OUTPUT_TOKENS, SAMPLING)]


def assert_alike(
    ours: list[list[TokenLogprobs]], theirs: list[list[TokenLogprobs]], tolerance: float
) -> None:
    """The first token's, and those of the others as long as they follow the same tokens."""
    for one, other in zip(ours, theirs, strict=True):
        for mine, its in zip(one, other, strict=True):
            expected = dict(zip(its.top_ids, its.top_logprobs, strict=True))
            told = dict(zip(mine.top_ids, mine.top_logprobs, strict=True))
            for token in expected.keys() & told.keys():
                assert told[token] == pytest.approx(expected[token], abs=tolerance)
            assert len(expected.keys() & told.keys()) >= 2
            if mine.top_ids[0] != its.top_ids[0]:
                break


@pytest.mark.parametrize("name", FORMATS)
def test_log_probabilities_are_those_of_the_numbers_that_a_checkpoint_stands_for(
    name: str, tmp_path: Path
) -> None:
    quantized, plain = write_pair(tmp_path, FORMATS[name])
    if name in INPUT_CASES:
        # What is to be computed is what the CPU makes of quantized inputs.
        reference = logprobs(quantized, "cpu", "float32")
        assert_alike(logprobs(quantized, "cuda", "float32"), reference, ROUNDED_TOLERANCE)
    else:
        reference = logprobs(plain, "cpu", "float32")
        assert_alike(logprobs(quantized, "cuda", "float16"), reference, TOLERANCE["float16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["awq, groups of 128", "gptq 2, second version", "squeezellm 3, sparse"])
def test_other_dtypes(name: str, dtype: str, tmp_path: Path) -> None:
    quantized, plain = write_pair(tmp_path, FORMATS[name])
    ours = logprobs(quantized, "cuda", dtype, enforce_eager=True)
    assert_alike(ours, logprobs(plain, "cpu", "float32"), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_weights_quantized_at_load(kind: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, **CONFIG)
    reference = logprobs(directory, "cpu", "float32", quantization=kind)
    assert_alike(logprobs(directory, "cuda", "float32", quantization=kind), reference, ROUNDED_TOLERANCE)


@pytest.mark.parametrize("deterministic", [False, True])
def test_quantized_experts(deterministic: bool, tmp_path: Path) -> None:
    quantized, plain = write_both(tmp_path, MIXTURES["gptq"], mixtral(), MIXTRAL, {})
    reference = logprobs(plain, "cpu", "float32")
    ours = logprobs(quantized, "cuda", "float16", deterministic=deterministic)
    assert_alike(ours, reference, TOLERANCE["float16"])


def test_deterministic_products_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, CASES["awq"][0])
    driver = CoreDriver(quantized, device="cuda", dtype="bfloat16", deterministic=True, **BOUNDS)
    together = [told for _, told in driver.generate(PROMPTS, OUTPUT_TOKENS, SAMPLING)]
    for prompt, expected in zip(PROMPTS, together, strict=True):
        driver = CoreDriver(quantized, device="cuda", dtype="bfloat16", deterministic=True, **BOUNDS)
        [(_, alone)] = driver.generate([prompt], OUTPUT_TOKENS, SAMPLING)
        assert [list(each.top_logprobs) for each in alone] == [list(each.top_logprobs) for each in expected]
