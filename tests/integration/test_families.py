"""Every family computes what transformers computes, in fp32: log probabilities and greedy tokens, with chunks
of odd sizes, prefix hits, and many requests at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import SamplingRecord
from scheduler.request import Request
from tests.integration.core_driver import CoreDriver
from tests.integration.plain_families import PLAIN_FAMILIES, write_plain
from tests.integration.tiny_families import CASES, VOCAB, reference, write_tiny
from tests.unit.engine.tiny_experts import write_gpt_oss

NUM_TOP = 4
OUTPUT_TOKENS = 9
SHARED = [(7 * i + 3) % VOCAB for i in range(37)]
# Some of them begin alike; the longest are longer than windows, and than what ropes are scaled from.
PROMPTS = [
    *([*SHARED, n, n + 1] for n in range(5, 11)),
    *([(11 * i + n) % VOCAB for i in range(n)] for n in (1, 2, 3, 7, 16, 17, 31, 70, 90, 41)),
]
LONG_PROMPTS = [*PROMPTS, *([(13 * i + n) % VOCAB for i in range(n)] for n in (66, 80, 101, 139))]
BOUNDS = {"max_num_batched_tokens": 37, "num_blocks": 160}
SAMPLING = SamplingRecord(temperature=0.0, logprobs=NUM_TOP)


INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
DEPEND_ON_LENGTH = {"phi4-mini", "llama-dynamic"}
Logits = Callable[[list[int]], torch.Tensor]


@pytest.mark.parametrize("case", [case for case in CASES if case not in DEPEND_ON_LENGTH])
def test_log_probabilities_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    compare(CoreDriver(write_tiny(case, tmp_path), **BOUNDS), reference(tmp_path), PROMPTS)


@pytest.mark.parametrize("case", PLAIN_FAMILIES)
def test_log_probabilities_are_those_of_a_plain_computation(case: str, tmp_path: Path) -> None:
    longest = 64 if case == "qwen1" else 128
    logits = write_plain(case, tmp_path, longest)
    prompts = [prompt for prompt in PROMPTS if len(prompt) + OUTPUT_TOKENS + 2 <= longest]
    compare(CoreDriver(tmp_path, max_model_len=longest, **BOUNDS), logits, prompts)


def test_qwen_goes_beyond_its_context_when_it_is_asked_to(tmp_path: Path) -> None:
    logits = write_plain("qwen1", tmp_path, 256)
    compare(CoreDriver(tmp_path, max_model_len=256, **BOUNDS), logits, PROMPTS)


def test_mxfp4_experts_are_those_that_their_values_make(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "mxfp4", tmp_path / "plain")
    logits = reference(tmp_path / "plain")
    for kind in ("mxfp4", "plain"):
        compare(CoreDriver(tmp_path / kind, **BOUNDS), logits, PROMPTS)


@pytest.mark.parametrize("length", [48, 150])
def test_a_rope_with_short_and_long_divisors_takes_those_of_the_context_that_is_served(
    length: int, tmp_path: Path
) -> None:
    """transformers chooses by each sequence's length, so only sequences on the same side are compared."""
    directory, original = write_tiny("phi4-mini", tmp_path), 64
    prompts = [prompt for prompt in LONG_PROMPTS if (len(prompt) > original) == (length > original)]
    prompts = [prompt for prompt in prompts if len(prompt) + OUTPUT_TOKENS + 2 <= length]
    assert len(prompts) > 3
    compare(CoreDriver(directory, max_model_len=length, **BOUNDS), reference(directory), prompts)


def test_a_dynamic_rope_is_that_of_the_longest_context_that_is_served(tmp_path: Path) -> None:
    """transformers takes each sequence's length: they agree on one of the longest length."""
    directory, length = write_tiny("llama-dynamic", tmp_path), 150
    prompt = [(11 * i + 5) % VOCAB for i in range(length - OUTPUT_TOKENS)]
    driver = CoreDriver(directory, max_model_len=length, **BOUNDS)
    check(driver.generate([prompt], OUTPUT_TOKENS, SAMPLING), reference(directory))


def compare(driver: CoreDriver, logits: Logits, prompts: list[list[int]]) -> None:
    """The second round finds what the first computed."""
    check(driver.generate(prompts, OUTPUT_TOKENS, SAMPLING), logits)
    served = driver.generate([[*prompt, 4, 5] for prompt in prompts], OUTPUT_TOKENS, SAMPLING)
    check(served, logits)
    assert sum(request.num_cached_tokens for request, _ in served) > sum(map(len, prompts)) // 2


def check(served: list[tuple[Request, list[TokenLogprobs]]], logits: Logits) -> None:
    for request, told in served:
        tokens, start = request.token_ids.tolist(), request.num_prompt_tokens
        expected = logits(tokens).log_softmax(-1)[start - 1 : -1]
        best = expected.topk(NUM_TOP)
        assert len(told) == OUTPUT_TOKENS
        for index, entry in enumerate(told):
            assert list(entry.top_logprobs) == pytest.approx(best.values[index].tolist(), abs=1e-4)
            chosen = expected[index, tokens[start + index]].item()
            assert chosen == pytest.approx(best.values[index, 0].item(), abs=1e-4), "the likeliest"


def test_the_language_model_of_a_multimodal_gemma_is_served(tmp_path: Path) -> None:
    """Its files have other names, an inner configuration, and parts for pictures."""
    text, whole = write_tiny("gemma3", tmp_path / "text"), tmp_path / "whole"
    whole.mkdir()
    values = json.loads((text / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": values, "dtype": "float32"}
    (whole / "config.json").write_text(json.dumps(outer))
    weights = load_file(text / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    save_file({**renamed, "vision_tower.patch.weight": torch.ones(3)}, whole / "model.safetensors")
    compare(CoreDriver(whole, **BOUNDS), reference(text), PROMPTS)


def test_internlm2_is_llama_with_other_names(tmp_path: Path) -> None:
    """Of each key-value head first its query heads are stored, then itself and its value head."""
    llama, own = (
        write_tiny("llama", tmp_path / "llama", attention_bias=False, mlp_bias=False),
        tmp_path / "own",
    )
    own.mkdir()
    values = json.loads((llama / "config.json").read_text())
    changes = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    (own / "config.json").write_text(json.dumps(values | changes))
    weights = load_file(llama / "model.safetensors")
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    for layer in range(values["num_hidden_layers"]):
        q, k, v = (
            weights.pop(f"model.layers.{layer}.self_attn.{name}_proj.weight").unflatten(0, (-1, head_dim))
            for name in "qkv"
        )
        grouped = torch.cat((q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]), 1)
        weights[f"model.layers.{layer}.attention.wqkv.weight"] = grouped.flatten(0, 2).contiguous()
    for theirs, name in INTERNLM2.items():
        weights = {key.replace(theirs, name): tensor for key, tensor in weights.items()}
    save_file(weights, own / "model.safetensors")
    compare(CoreDriver(own, **BOUNDS), reference(llama), PROMPTS)
