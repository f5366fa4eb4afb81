"""A model that is served from a GGUF file computes what the original checkpoint computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.dispatch.sampling import SamplingRecord
from pagewire.hub.gguf.convert import convert_gguf
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_families import VOCAB, reference
from tests.unit.hub.gguf_checkpoints import CASES, write_checkpoint, write_gguf

OUTPUT_TOKENS = 4
PROMPTS = [[(11 * i + n) % VOCAB for i in range(n)] for n in (5, 30, 41)]


# Permuted rows and biases; norms of 1 + weight, windows and two rotations; fused matrices.
@pytest.mark.parametrize("name", ["llama-biases", "gemma3", "phi3", "mixtral"])
def test_log_probabilities_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config, tensors = write_checkpoint(case, tmp_path / "original")
    write_gguf(case, config, tensors, tmp_path / "tiny.gguf")
    (tmp_path / "converted").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted", progress=False)

    logits = reference(tmp_path / "original")
    driver = CoreDriver(tmp_path / "converted", max_num_batched_tokens=37)
    for request, told in driver.generate(PROMPTS, OUTPUT_TOKENS, SamplingRecord(temperature=0.0, logprobs=3)):
        expected = logits(request.token_ids.tolist()).log_softmax(-1)[request.num_prompt_tokens - 1 : -1]
        for entry, row in zip(told, expected, strict=True):
            assert torch.allclose(torch.tensor(entry.top_logprobs), row.topk(3).values, atol=1e-4)
