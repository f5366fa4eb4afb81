"""The same engine on a CUDA device, through its real worker process. Needs one: `make test-gpu`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import WorkerConfig
from pagewire import LLM, SamplingParams
from pagewire.base.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

VOCAB = 2000
PROMPTS = [
    [(7 * index + 13 * salt) % VOCAB for index in range(length)] for salt, length in enumerate((1, 30, 200))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, in Hugging Face layout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


OPTIONS: list[dict[str, Any]] = [{}, {"max_num_batched_tokens": 33}, {"num_blocks": 32}]
OPTIONS += [
    {name: True}
    for name in ("enforce_eager", "deterministic")
    if name in {field.name for field in fields(WorkerConfig)}
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_greedy_tokens_equal_transformers_on_the_device(model: Path, options: dict[str, Any]) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(str(model), device="cuda", dtype="float32", **options) as llm:
        outputs = llm.generate(PROMPTS * 3, sampling)
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).cuda().eval()
    for prompt, output in zip(PROMPTS * 3, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens], device="cuda")
            best = reference(ids).logits[0, len(prompt) - 1 : -1].topk(2)
        gaps = -best.values.diff()[:, 0]
        for token, choice, gap in zip(tokens, best.indices.tolist(), gaps.tolist(), strict=True):
            assert token == choice[0] or (token == choice[1] and gap < 1e-3)


def test_seeded_tokens_are_the_same_alone_and_in_a_batch(model: Path) -> None:
    params = [SamplingParams(seed=seed, top_p=0.9, max_tokens=24, ignore_eos=True) for seed in range(6)]
    prompts = (PROMPTS * 2)[:6]
    with LLM(str(model), device="cuda", dtype="float32") as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        alone = [
            llm.generate([prompt], each)[0].outputs[0].token_ids
            for prompt, each in zip(prompts, params, strict=True)
        ]
    assert together == alone


def test_a_share_of_the_gpu_that_leaves_nothing_for_kv_is_refused_with_the_numbers(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no GPU memory is left for the KV pool: .* GiB allowed of .*; "):
        LLM(str(model), device="cuda", gpu_memory_utilization=0.001).close()


def test_a_model_larger_than_the_gpu_is_refused_with_the_numbers(tmp_path: Path) -> None:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=16384,
        intermediate_size=65536,
        num_hidden_layers=80,
        num_attention_heads=128,
        vocab_size=VOCAB,
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the model does not fit cuda.* GiB, .* are taken by it so far, "):
        LLM(str(tmp_path), device="cuda", load_format="dummy").close()
