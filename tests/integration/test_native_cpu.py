"""A model whose weights stay in the format of their file computes what its dequantized numbers say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from engine.cpu.kernels.build import BuildError
from engine.cpu.native import open_native
from engine.cpu.weights import weight_bytes
from engine.dispatch.sampling import SamplingRecord
from pagewire.hub.gguf.convert import convert_gguf
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_families import VOCAB, write_tiny
from tests.unit.hub.gguf_checkpoints import CASES, write_checkpoint, write_gguf

pytestmark = pytest.mark.usefixtures("native_kernels")

PROMPTS = [[(11 * i + n) % VOCAB for i in range(n)] for n in (5, 30, 41)]
# With the same system prompt, so that later ones find its blocks.
SHARED = [[(7 * i) % VOCAB for i in range(33)] + [n] for n in range(12)]
OUTPUT_TOKENS = 6


@pytest.fixture(scope="module")
def native_kernels() -> None:
    try:
        open_native()
    except BuildError as error:
        pytest.skip(str(error))


def in_16_bits(directory: Path) -> Path:
    """The checkpoint with its matrices in bfloat16."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({name: each.bfloat16() for name, each in tensors.items()}, path, metadata={"format": "pt"})
    return directory


def in_blocks(name: str, kind: str, scratch: Path) -> Path:
    """A tiny checkpoint whose matrices are in blocks."""
    case = CASES[name]
    original = write_checkpoint(case, scratch / "original")
    write_gguf(case, *original, scratch / "tiny.gguf", kind=GGMLQuantizationType[kind])
    (scratch / "converted").mkdir()
    convert_gguf(scratch / "tiny.gguf", scratch / "converted", progress=False)
    return scratch / "converted"


def logprobs(driver: CoreDriver) -> np.ndarray:
    """Of the likeliest three at every position of some answers: alone, with prefix hits, twelve at once."""
    sampling = SamplingRecord(temperature=0.0, logprobs=3)
    told = []
    for prompts in (*([prompt] for prompt in PROMPTS), SHARED):
        for _, entries in driver.generate(prompts, OUTPUT_TOKENS, sampling):
            told.append([entry.top_logprobs for entry in entries])
    return np.asarray(told)


@pytest.mark.parametrize("case", ["llama", "gemma3", "mixtral", "gpt-oss"])
def test_bfloat16_weights_are_multiplied_in_fp32(case: str, tmp_path: Path) -> None:
    directory = in_16_bits(write_tiny(case, tmp_path))
    settings = {"max_num_batched_tokens": 37}
    expected = logprobs(CoreDriver(directory, dtype="float32", **settings))
    assert np.allclose(logprobs(CoreDriver(directory, dtype="auto", **settings)), expected, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_steps_that_were_recorded_compute_the_same_bits(case: str, tmp_path: Path) -> None:
    directory = in_16_bits(write_tiny(case, tmp_path))
    recorded, plain = (CoreDriver(directory, dtype="auto") for _ in range(2))
    assert recorded.runner.recorded is not None
    plain.runner.recorded = None
    assert np.array_equal(logprobs(recorded), logprobs(plain))
    assert recorded.runner.recorded.sizes >= {1, 12}


@pytest.mark.parametrize("case", ["mixtral", "llama in float32"])
def test_a_model_that_torch_computes_a_part_of_is_not_recorded(case: str, tmp_path: Path) -> None:
    """Chosen experts, products of plain weights by oneDNN."""
    directory = write_tiny(case.partition(" ")[0], tmp_path)
    driver = CoreDriver(directory if "float32" in case else in_16_bits(directory), dtype="auto")
    logprobs(driver)
    assert driver.runner.recorded.sizes == set()


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "baichuan"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_blocks_are_computed_on_up_to_the_rounding_of_activations(
    name: str, kind: str, tmp_path: Path
) -> None:
    directory = in_blocks(name, kind, tmp_path)
    exact, native = (CoreDriver(directory, dtype=dtype) for dtype in ("float32", "auto"))
    prompts, sampling = PROMPTS + SHARED, SamplingRecord(temperature=0.0, logprobs=3, prompt_logprobs=0)
    theirs, ours = (driver.generate(prompts, 1, sampling) for driver in (exact, native))
    errors = [
        abs(a.top_logprobs[0] - b.top_logprobs[0]) for (_, [a]), (_, [b]) in zip(theirs, ours, strict=True)
    ]
    assert max(errors) < 0.25
    assert sum(errors) / len(errors) < 0.06


LONG = [(13 * i + i // 7) % VOCAB for i in range(243)]


def told(driver: CoreDriver, *others: list[int]) -> np.ndarray:
    """The log probabilities of many tokens at each position of an answer to LONG, beside other requests."""
    answers = driver.generate([*others, LONG], OUTPUT_TOKENS, SamplingRecord(temperature=0.0, logprobs=20))
    return np.array([entry.top_logprobs for entry in answers[-1][1]])


@pytest.mark.parametrize(("name", "kind"), [("llama", "Q4_1"), ("phi3", "F16")])
def test_a_request_has_the_same_bits_however_its_steps_are_cut(name: str, kind: str, tmp_path: Path) -> None:
    """Its prompt at once or in chunks, its prefix computed or found, alone or beside others."""
    directory = in_blocks(name, kind, tmp_path)
    settings: dict[str, Any] = {"dtype": "auto", "num_blocks": 128}
    driver = CoreDriver(directory, max_num_batched_tokens=512, **settings)
    whole = told(driver)
    assert np.array_equal(told(driver), whole), "with its prefix in the cache"
    assert np.array_equal(told(driver, *SHARED, LONG[:200]), whole), "beside others"
    for size, others in ((17, []), (90, SHARED)):
        cut = CoreDriver(directory, max_num_batched_tokens=size, **settings)
        assert np.array_equal(told(cut, *others), whole), size


def test_a_worker_tells_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = in_blocks("llama", "Q4_1", tmp_path)
    driver = CoreDriver(directory, dtype="auto")
    assert re.fullmatch(r"native (avx512|avxvnni|avx2|plain), \d+ threads?", driver.facts.kernels)
    weights = weight_bytes(driver.runner.model)
    assert list(weights) == ["Q4_1", "float32"], "matrices, then norms"
    assert driver.facts.weights == "0 MB"
    exact = CoreDriver(directory, dtype="float32")
    assert exact.facts.kernels.endswith("; torch for matrices, by --dtype float32")
    assert list(weight_bytes(exact.runner.model)) == ["float32"]
    monkeypatch.setenv("CXX", "/nowhere/c++")
    without = CoreDriver(directory, dtype="auto").facts.kernels
    assert without.startswith("torch: no native kernels, the C++ compiler /nowhere/c++ does not run")
