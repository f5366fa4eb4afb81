"""Several answers to one request: prompts, samples, the best of them, and beams."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.reference import Reference
from tests.conformance.target import Target
from tests.e2e.prompts import STORY

TEXTS = ["The capital of France is", "Once upon a time, in a small village by the sea,", "1, 1, 2, 3, 5, 8,"]


def test_several_prompts_are_answered_in_their_order(target: Target) -> None:
    together = target.completion(prompt=TEXTS, temperature=0, max_tokens=6)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    alone = [target.completion(prompt=text, temperature=0, max_tokens=6) for text in TEXTS]
    assert [choice.text for choice in together.choices] == [each.choices[0].text for each in alone]
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(together.usage, name) == sum(getattr(each.usage, name) for each in alone)


def test_prompts_may_be_token_ids(target: Target) -> None:
    ids = [target.tokenize(prompt=text) for text in TEXTS]
    texts = [choice.text for choice in target.completion(prompt=TEXTS, temperature=0, max_tokens=6).choices]
    many = target.completion(prompt=ids, temperature=0, max_tokens=6)
    assert [choice.text for choice in many.choices] == texts
    assert target.choice(prompt=ids[0], max_tokens=6).text == texts[0]


def test_samples_differ_by_seed_and_repeat(target: Target) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS[1], "n": 3, "seed": 11, "temperature": 1, "max_tokens": 8}
    first = target.completion(**asked)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in target.completion(**asked).choices] == texts
    assert first.usage.completion_tokens == 24
    assert first.usage.prompt_tokens == len(target.tokenize(prompt=TEXTS[1]))  # once for all of them


@pytest.mark.extension
def test_the_first_sample_is_what_the_seed_gives_and_the_others_are_no_other_seeds(target: Target) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS[:2], "temperature": 1, "max_tokens": 8}
    together = [
        [choice.text for choice in target.completion(**asked, n=2, seed=seed).choices] for seed in (11, 12)
    ]
    alone = [[choice.text for choice in target.completion(**asked, seed=seed).choices] for seed in (11, 12)]
    assert [texts[::2] for texts in together] == alone
    assert not {*together[0]} & {*together[1]}


@pytest.mark.extension
def test_samples_share_the_prompts_blocks(target: Target, model_directory: Path) -> None:
    """Beyond the first, a sample computes what is left of the prompt's last block, and its own tokens."""

    def computed() -> float:
        [value] = re.findall(r"^pagewire:computed_tokens_total(?:{.*})? (\S+)$", metrics(), re.MULTILINE)
        return float(value)

    def metrics() -> str:
        return target.http.get("/metrics").text

    before = computed()
    usage = target.completion(prompt="Shared: " + STORY, n=4, max_tokens=2, cache_salt="shared").usage
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.prompt_tokens <= computed() - before < usage.prompt_tokens + 4 * (16 + 2)


@pytest.mark.extension
def test_best_of_returns_what_has_the_highest_mean_log_probability(target: Target) -> None:
    asked: dict[str, Any] = {
        "prompt": TEXTS[1],
        "temperature": 1.2,
        "seed": 5,
        "max_tokens": 8,
        "logprobs": 0,
    }
    every = target.completion(n=5, **asked).choices
    best = target.completion(n=2, best_of=5, **asked)
    assert best.usage.completion_tokens == 40

    def mean(choice: Any) -> float:
        logprobs = choice.logprobs.token_logprobs
        return float(sum(logprobs) / len(logprobs))

    ranked = sorted(every, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]


@pytest.mark.extension
@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping"),
    [(3, 0.5, False), pytest.param(4, 2.0, True, marks=pytest.mark.slow)],
)
def test_beams_are_those_of_transformers(
    float32_target: Target, reference: Reference, width: int, length_penalty: float, early_stopping: bool
) -> None:
    """Several prompts in one request, each with its own search; the last can end early."""
    texts = [*TEXTS[:2], "<|im_start|>user\nSay yes or no.<|im_end|>\n<|im_start|>assistant\n"]
    settings: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    answer = float32_target.completion(
        prompt=texts, use_beam_search=True, n=width, max_tokens=7, return_token_ids=True, **settings
    )
    found: list[Any] = [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]
    for number, text in enumerate(texts):
        expected = reference.beams(text, width, max_new_tokens=7, **settings)
        assert found[number * width : (number + 1) * width] == [tokens for tokens, _ in expected]
    assert answer.usage.completion_tokens == sum(map(len, found))


@pytest.mark.extension
def test_beams_are_at_least_as_likely_as_the_greedy_text(target: Target) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS[1], "max_tokens": 8, "logprobs": 0}
    greedy = sum(target.choice(**asked).logprobs.token_logprobs)
    best, second = target.completion(**asked, use_beam_search=True, n=2, best_of=4).choices
    assert sum(best.logprobs.token_logprobs) >= greedy - 1e-3
    assert best.text != second.text
