"""How the next token is chosen: the effect of every parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from tests.conformance.target import Target

TALE = "Once upon a time, in a small village by the sea,"
SONG = "la, la, la, la, la, la, la, la, la,"
"""A greedy model sings on."""
HOT: Mapping[str, Any] = {"prompt": TALE, "temperature": 1.5, "max_tokens": 8}


@pytest.fixture(scope="module")
def greedy(target: Target) -> str:
    """What the model finds likeliest."""
    text: str = target.choice(prompt=TALE, max_tokens=8).text
    return text


def sampled(target: Target, **fields: Any) -> str:
    """The text of one completion."""
    return target.completion(**{**HOT, **fields}).choices[0].text


def test_temperature_zero_repeats(target: Target, greedy: str) -> None:
    assert greedy
    assert target.choice(prompt=TALE, max_tokens=8).text == greedy


def test_a_seed_repeats_and_seeds_differ(target: Target) -> None:
    # One after another: in other company logits are rounded differently, and one draw in some thousands falls
    # between two tokens.
    texts = [sampled(target, seed=seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_without_a_seed_samples_differ(target: Target) -> None:
    assert len(set(target.texts([HOT] * 3))) > 1


def test_a_top_p_of_next_to_nothing_is_greedy(target: Target, greedy: str) -> None:
    assert sampled(target, seed=1) != greedy
    assert sampled(target, seed=1, top_p=1e-6) == greedy


@pytest.mark.extension
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}], ids=["top_k", "min_p"])
def test_what_keeps_one_token_is_greedy(target: Target, greedy: str, narrow: dict[str, Any]) -> None:
    assert sampled(target, seed=1, **narrow) == greedy


@pytest.mark.extension
@pytest.mark.parametrize(
    ("narrow", "count"), [({"top_k": 3}, 3), ({"min_p": 0.5}, 20), ({"top_p": 0.5}, 20)], ids=str
)
def test_samples_are_of_what_is_kept(target: Target, narrow: dict[str, Any], count: int) -> None:
    """Every sampled token is among the likeliest, as far down as each parameter says."""
    [choice] = target.completion(
        prompt=TALE, seed=3, max_tokens=16, logprobs=20, return_token_ids=True, temperature=1, **narrow
    ).choices
    columns = choice.logprobs
    for chosen, top in zip(columns.token_logprobs, columns.top_logprobs, strict=True):
        likeliest = sorted(top.values(), reverse=True)[:count]
        rank = sum(each > chosen + 1e-6 for each in likeliest)
        assert rank < count
        if "min_p" in narrow:
            assert chosen >= likeliest[0] + math.log(0.5) - 1e-4
        if "top_p" in narrow:
            assert sum(map(math.exp, likeliest[:rank])) < 0.5 + 1e-4


def test_a_bias_forces_a_token(target: Target) -> None:
    once = target.choice(prompt=TALE, max_tokens=1, logit_bias={"42": 100}).text
    assert target.choice(prompt=TALE, max_tokens=3, logit_bias={"42": 100}).text == once * 3
    assert target.choice(prompt=TALE, max_tokens=3, logit_bias={"43": 100}).text != once * 3


@pytest.mark.extension
def test_a_bias_forbids_a_token(target: Target, greedy: str) -> None:
    first = target.tokens(greedy)[0]
    choice = target.choice(prompt=TALE, max_tokens=8, logit_bias={first: -100}, return_token_ids=True)
    assert first not in choice.token_ids


@pytest.mark.extension
def test_only_allowed_tokens_are_chosen(target: Target) -> None:
    allowed = range(1000, 1020)
    asked = {"seed": 1, "temperature": 2, "max_tokens": 12, "return_token_ids": True}
    choice = target.choice(prompt=TALE, allowed_token_ids=list(allowed), **asked)
    assert set(choice.token_ids) <= set(allowed)
    assert len(set(choice.token_ids)) > 2


@pytest.mark.extension
def test_bad_words_do_not_appear(target: Target, greedy: str) -> None:
    word = greedy.split()[0]
    assert word not in target.choice(prompt=TALE, max_tokens=8, bad_words=[word]).text
    sentence = " ".join(greedy.split())
    other = target.choice(prompt=TALE, max_tokens=8, bad_words=[sentence]).text
    assert other.split()[0] == word  # only what would complete the words is forbidden
    assert " ".join(other.split()) != sentence


@pytest.mark.parametrize(
    "penalty",
    [
        {"frequency_penalty": 2},
        pytest.param({"repetition_penalty": 2}, marks=pytest.mark.extension),
    ],
    ids=str,
)
def test_penalties_stop_a_song(target: Target, penalty: dict[str, Any]) -> None:
    asked = {"prompt": SONG, "max_tokens": 16, "temperature": 0}
    sung, stopped = target.texts([asked, asked | penalty])
    assert sung.count("la") >= 7
    assert stopped.count("la") <= 4


@pytest.mark.extension
def test_only_the_repetition_penalty_counts_the_prompt(target: Target) -> None:
    """The first token of the answer was in the prompt, and not yet in the output."""
    asked = {"prompt": SONG, "max_tokens": 1, "temperature": 0}
    penalties = {"presence_penalty": 2, "frequency_penalty": 2}, {"repetition_penalty": 10}
    plain, output_only, prompt_too = target.texts([asked, *(asked | each for each in penalties)])
    assert output_only == plain != prompt_too


def test_negative_penalties_say_again_what_was_said(target: Target) -> None:
    """And positive ones say less of it again than negative ones."""
    names = ("presence_penalty", "frequency_penalty")
    asked = {"prompt": TALE, "seed": 1, "temperature": 1, "max_tokens": 40}
    texts = target.texts([asked, *(asked | {name: value} for name in names for value in (-2, 2))])
    free, *counts = (len(set(text.split())) for text in texts)
    for repeating, varied in (counts[:2], counts[2:]):
        assert repeating < free
        assert repeating < varied
