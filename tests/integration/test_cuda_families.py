"""Every family through the kernels and CUDA graphs, in fp32: as on the CPU, what transformers or plain torch
computes (test_families.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.core_driver import CoreDriver
from tests.integration.plain_families import PLAIN_FAMILIES, write_plain
from tests.integration.test_families import (
    BOUNDS,
    DEPEND_ON_LENGTH,
    OUTPUT_TOKENS,
    PROMPTS,
    compare,
)
from tests.integration.tiny_families import CASES, reference, write_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("case", [case for case in CASES if case not in DEPEND_ON_LENGTH])
def test_log_probabilities_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    directory = write_tiny(case, tmp_path)
    compare(CoreDriver(directory, device="cuda", **BOUNDS), reference(directory), PROMPTS)


@pytest.mark.parametrize("case", PLAIN_FAMILIES)
def test_log_probabilities_are_those_of_a_plain_computation(case: str, tmp_path: Path) -> None:
    longest = 128
    logits = write_plain(case, tmp_path, longest)
    prompts = [prompt for prompt in PROMPTS if len(prompt) + OUTPUT_TOKENS + 2 <= longest]
    compare(CoreDriver(tmp_path, device="cuda", max_model_len=longest, **BOUNDS), logits, prompts)
