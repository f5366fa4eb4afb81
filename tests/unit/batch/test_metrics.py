"""Metrics of results."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.batch.metrics import accuracy, common_subsequence, perplexity, rouge, rouge_of, words


@pytest.mark.parametrize(
    ("response", "labels", "expected"),
    [
        ("The cat sat on the mat.", "The cat is on the mat, the black one.", (0.666667, 0.461538, 0.666667)),
        ("police killed the gunman", "the gunman killed police", (1.0, 0.333333, 0.5)),
        ("a b c d e f g", "g f e d c b a", (1.0, 0.0, 0.142857)),
        ("Rome", "It is Rome", (0.5, 0.0, 0.5)),
        ("x y", "p q", (0.0, 0.0, 0.0)),
        ("", "p q", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_is_that_of_the_rouge_score_package(response: str, labels: str, expected: tuple) -> None:
    """rouge-score 0.1.2, without stemming."""
    assert rouge_of(words(response), words(labels)) == pytest.approx(expected, abs=1e-6)


def test_words_are_of_any_script() -> None:
    assert words("浙江 is Naïve, カナ 한국어 привет") == [
        "浙",
        "江",
        "is",
        "naïve",
        "カ",
        "ナ",
        "한국어",
        "привет",
    ]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(first, second) == table[-1][-1]


def test_metrics_are_of_the_results_that_have_both() -> None:
    results = [
        {"response": "Paris", "labels": "Paris "},
        {"response": "Paris", "labels": "Rome"},
        {"response": None, "labels": "Rome", "error": "no"},
        {"response": "Paris", "labels": None},
    ]
    assert accuracy(results) == {"acc": 0.5}
    assert rouge(results) == {"rouge-1": 50.0, "rouge-2": 0.0, "rouge-l": 50.0}


def test_perplexity_is_of_all_tokens_together() -> None:
    results = [{"logprob": -1.0, "num_tokens": 1}, {"logprob": -2.0, "num_tokens": 3}, {"error": "no"}]
    assert perplexity(results) == {"ppl": pytest.approx(math.exp(3 / 4))}
