"""What responses are worth beside the answers of a data set.

ROUGE is computed here because nothing that is kept up does it: rouge-score and rouge had their last releases
in 2022 and 2021, and the former drops every letter that is not a-z.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3040-\u9fff\uf900-\ufaff]+")
"""A word, or one character of a script that is written without spaces."""


def accuracy(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of responses that are their labels, letter by letter, but for space around them."""
    return {"acc": _mean([float(_same(*each)) for each in _pairs(results)])}


def rouge(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, each the mean F1 over all pairs, times 100."""
    scores = [rouge_of(words(response), words(labels)) for response, labels in _pairs(results)]
    names = ("rouge-1", "rouge-2", "rouge-l")
    return {name: 100 * _mean(column) for name, column in zip(names, zip(*scores, strict=True), strict=True)}


def perplexity(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """That of all scored tokens together: exp of minus their mean log probability."""
    scored = [(each["logprob"], each["num_tokens"]) for each in results if "logprob" in each]
    num_tokens = sum(number for _, number in scored)
    return {"ppl": math.exp(-sum(logprob for logprob, _ in scored) / num_tokens)}


def words(text: str) -> list[str]:
    """The words of a text in lower case; Chinese and Japanese characters are a word each."""
    return _WORD.findall(text.lower())


def rouge_of(response: Sequence[str], labels: Sequence[str]) -> tuple[float, float, float]:
    """F1 of the words, of the pairs of words, and of the longest common subsequence (Lin 2004)."""
    longest = common_subsequence(response, labels)
    return (
        _f1(_overlap(response, labels, 1), len(response), len(labels)),
        _f1(_overlap(response, labels, 2), len(response) - 1, len(labels) - 1),
        _f1(longest, len(response), len(labels)),
    )


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, by bits (Hyyrö 2004): 64 cells of the table at a time."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()


def _overlap(first: Sequence[str], second: Sequence[str], size: int) -> int:
    """How many n-grams of this size are in both, each as often as in the one that has it less often."""
    return (_ngrams(first, size) & _ngrams(second, size)).total()


def _ngrams(text: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[start : start + size]) for start in range(len(text) - size + 1))


def _f1(common: int, num_first: int, num_second: int) -> float:
    return 2 * common / (num_first + num_second) if common else 0.0


def _pairs(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Response and labels of each result that has both."""
    pairs = [(each.get("response"), each.get("labels")) for each in results]
    return [(response, labels) for response, labels in pairs if response is not None and labels is not None]


def _same(response: str, labels: str) -> bool:
    return response.strip() == labels.strip()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
