"""Qwen3, with its normalised query and key heads, and with a sliding window in some of its layers, gives
transformers' greedy tokens in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engine.config import WorkerConfig
from engine.worker.build import build_worker
from tests.integration.plan_driver import PlanDriver

VOCAB = 300
PROMPT_LENGTHS = (1, 7, 40)
OUTPUT_TOKENS = 12
TIE = 1e-4


# The longest prompt is several windows long, and a window is no multiple of a block.
WINDOWED = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}


@pytest.fixture(scope="module", params=[{}, WINDOWED], ids=["full", "windowed"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # 4 heads of it are wider than the hidden size, as in Qwen3-0.6B
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **request.param,
    )
    reference = Qwen3ForCausalLM(config)
    for name, parameter in reference.named_parameters():
        if name.endswith("_norm.weight"):
            parameter.data.normal_(1.0, 0.3)
    directory = tmp_path_factory.mktemp("qwen3")
    reference.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("budget", [5, 64])
def test_greedy_tokens_are_those_of_transformers(model: Path, budget: int) -> None:
    config = WorkerConfig(
        model=str(model), socket=Path("unused"), device="cpu", dtype="float32", num_blocks=32
    )
    prompts = [[(11 * i + n) % VOCAB for i in range(n)] for n in PROMPT_LENGTHS]
    driver = PlanDriver(build_worker(config).runner, budget=budget, steps_ahead=1)
    reference = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for request, prompt in zip(driver.generate(prompts, OUTPUT_TOKENS), prompts, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + request.output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(request.output)[:, None])[:, 0]
        assert len(request.output) == OUTPUT_TOKENS
        assert (logits.max(dim=-1).values - chosen < TIE).all()
