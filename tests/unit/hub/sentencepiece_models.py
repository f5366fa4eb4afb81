"""Small SentencePiece models, trained in a fraction of a second."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import sentencepiece

CORPUS = (
    "The quick brown fox isn't 12,345 years old: été, 北京!",
    "def f(x):\n\treturn  x**2    # ok",
    "naïve café Übermut straße",
    "漢字 日本語 한국어 עברית हिन्दी",
    "aaa bbbb ababab    spaced    out",
    "http://example.com/a/b?c=d&e=f",
    "x = [1, 2, 3]; y = {'a': 1} <s> </s>",
    "😀👩‍👩‍👧 zero\u200bwidth",
)
_LETTERS = "ab  \tcé漢xTh.,<!1年😀e\u0301①Ａ\n"


@functools.cache
def _train(settings: tuple[tuple[str, Any], ...]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        minloglevel=3,
        hard_vocab_limit=False,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings},
    )
    return model.getvalue()


def train(kind: str, *, symbols: tuple[str, ...] = (), vocab_size: int = 420, **settings: Any) -> bytes:
    """A model file's content.

    Args:
        kind: "bpe" or "unigram".
        symbols: user-defined ones.
        settings: of the trainer; those of Llama where nothing else is said.
    """
    defaults = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    given = {**defaults, **settings, "model_type": kind, "vocab_size": vocab_size}
    if symbols:
        given["user_defined_symbols"] = symbols
    return _train(tuple(sorted(given.items())))


def texts(symbols: tuple[str, ...] = ()) -> list[str]:
    """Random texts of few letters and of all of Unicode's, runs, code, and what spells control pieces."""
    generator = random.Random(0)
    parts = [*_LETTERS, *symbols]
    few = ["".join(generator.choices(parts, k=generator.randint(0, 14))) for _ in range(1500)]
    many = ["".join(chr(generator.randint(1, 0x2FFF)) for _ in range(8)) for _ in range(300)]
    runs = ["a" * count + " " * count + "x" for count in range(40)]
    return [*few, *many, *runs, *CORPUS, "<0x41> <s> </s><unk>", "\N{REPLACEMENT CHARACTER}\0 \uffff"]
