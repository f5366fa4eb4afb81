"""Classifications are transformers' logits and pooled states its hidden states, for every family that has
such checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.dispatch.sampling import Pooling, SamplingRecord
from pagewire.base.errors import ConfigError
from tests.integration.core_driver import CoreDriver
from tests.integration.tiny_families import VOCAB, reference, write_tiny
from tests.integration.tiny_heads import FAMILIES, write_backbone, write_classifier

# Several lengths, computed in several steps, of which some begin alike. No token is the padding's (0), which
# transformers takes for the end.
PROMPTS = [
    [(13 * i + 7 * j) % (VOCAB - 1) + 1 for i in range(n)] for j, n in enumerate((1, 5, 17, 40, 33, 70))
]
PROMPTS += [PROMPTS[3] + [9, 8], [5, 5, 5]]
QUICK = ("llama", "mistral", "qwen2", "gemma3")
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES if case not in QUICK]
OTHER_BACKBONES = ("llama", "qwen2", "gemma", "gemma2", "gemma3", "phi3")
BOUNDS = {"max_num_seqs": 5, "max_num_batched_tokens": 23, "max_model_len": 96, "num_blocks": 40}


@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_a_classification_is_transformers_logits(case: str, tmp_path: Path) -> None:
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    model = write_classifier(case, tmp_path, id2label=labels)
    driver = CoreDriver(tmp_path, **BOUNDS)
    assert (driver.facts.task, driver.facts.labels) == ("classify", ("negative", "neutral", "positive"))
    for turn in range(2):  # the second time prefixes are cached
        found = driver.pool(PROMPTS)
        for (_, logits), prompt in zip(found, PROMPTS, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        assert bool(turn) == (sum(request.num_cached_tokens for request, _ in found) > 100)


def test_classifications_wait_for_room_in_a_small_pool(tmp_path: Path) -> None:
    model = write_classifier("qwen2", tmp_path, num_labels=1)
    driver = CoreDriver(tmp_path, **{**BOUNDS, "num_blocks": 20, "block_size": 16})
    found = driver.pool(PROMPTS)
    for (_, logits), prompt in zip(found, PROMPTS, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_head_is_computed_in_float32_whatever_the_models_format(tmp_path: Path) -> None:
    model = write_classifier("llama", tmp_path)
    driver = CoreDriver(tmp_path, **BOUNDS, dtype="bfloat16")
    [(_, logits)] = driver.pool([PROMPTS[2]])
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[2]])).logits[0]
    assert logits.dtype == "float32"
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    "case", ["qwen3", "mistral", *(pytest.param(case, marks=pytest.mark.slow) for case in OTHER_BACKBONES)]
)
def test_a_decoder_alone_is_embedded(case: str, tmp_path: Path) -> None:
    model = write_backbone(case, tmp_path)
    driver = CoreDriver(tmp_path, **BOUNDS)
    assert driver.facts.task == "embed"
    for kind in (Pooling.LAST, Pooling.MEAN):
        for (_, state), prompt in zip(driver.pool(PROMPTS, kind), PROMPTS, strict=True):
            with torch.inference_mode():
                hidden = model(torch.tensor([prompt])).last_hidden_state[0]
            expected = hidden[-1] if kind == Pooling.LAST else hidden.mean(0)
            torch.testing.assert_close(torch.from_numpy(state), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tied", "task"), [(True, "generate"), (False, "embed")])
def test_a_decoder_saved_alone_under_a_generators_name_is_read(tied: bool, task: str, tmp_path: Path) -> None:
    """As Qwen3-Embedding is published; with tied embeddings it can generate."""
    model = write_backbone("qwen3", tmp_path, tie_word_embeddings=tied)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    driver = CoreDriver(tmp_path, **BOUNDS)
    assert driver.facts.task == task
    [(_, state)] = driver.pool([PROMPTS[2]])
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[2]])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.from_numpy(state), expected, rtol=1e-4, atol=1e-4)


def test_a_generator_tells_the_log_probability_of_the_one_token_that_it_may_generate(tmp_path: Path) -> None:
    """By which generators score pairs of texts: it is that of the raw logits."""
    logits = reference(write_tiny("llama", tmp_path))(PROMPTS[3])[-1].log_softmax(-1)
    driver = CoreDriver(tmp_path, **BOUNDS)
    for token_id in (int(logits.argmin()), 7):
        sampling = SamplingRecord(temperature=0.0, logprobs=0, allowed_token_ids=(token_id,))
        [(request, [told])] = driver.generate([PROMPTS[3]], 1, sampling)
        assert request.token_ids[-1] == token_id
        assert told.logprob == pytest.approx(float(logits[token_id]), abs=1e-4)


def test_a_generator_without_its_output_projection_is_refused(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    _change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        CoreDriver(tmp_path, **BOUNDS)


def test_a_classifier_without_its_head_is_refused_and_a_left_over_projection_is_not(tmp_path: Path) -> None:
    write_classifier("llama", tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCAB, 64)}))
    assert CoreDriver(tmp_path, **BOUNDS).facts.task == "classify"
    _change(tmp_path, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(ConfigError, match=r"score\.weight"):
        CoreDriver(tmp_path, **BOUNDS)


def _change(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
