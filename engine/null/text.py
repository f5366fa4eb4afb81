"""Token ids that read like text: which there are, and which one comes where."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.dispatch.sampling import U32, U32Array
from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.token_pieces import read_tokenizer, special_token_ids, token_bytes

# Whole words, and what stands between them. Every token's bytes are whole characters.
WORD = re.compile(r" [A-Za-z]{2,}|[,.]")
# A cycle through this many places; a power of two. Long enough that two seeds seldom share a place.
CYCLE = 1 << 16

U64Array = npt.NDArray[np.uint64]


def text_token_ids(model_dir: Path, excluded: Set[int], vocab_size: int) -> U32Array:
    """The ids whose text is a word or a mark, in order.

    Args:
        model_dir: has the tokenizer.
        excluded: ids not to use.
        vocab_size: ids are below it.

    Raises:
        ConfigError: the tokenizer cannot be read, or has no such token.
    """
    tokenizer = read_tokenizer(model_dir)
    special = special_token_ids(tokenizer) | excluded
    ids = [
        token_id
        for token_id, data in enumerate(token_bytes(tokenizer)[:vocab_size])
        if token_id not in special and WORD.fullmatch(data.decode("utf-8", "replace"))
    ]
    if not ids:
        raise ConfigError(f"{model_dir}: the tokenizer has no word to make the null engine's text of")
    return np.array(ids, U32)


class NullText:
    """An endless text, in which every seed begins somewhere else.

    Args:
        token_ids: what it is made of.
    """

    def __init__(self, token_ids: U32Array) -> None:
        self.token_ids = token_ids
        self._cycle = np.random.default_rng(0).choice(token_ids, CYCLE)

    def tokens(self, begins: U64Array, positions: U32Array) -> U32Array:
        """The tokens at some positions of the texts that begin there."""
        tokens: U32Array = self._cycle[(begins + positions) & np.uint64(CYCLE - 1)]
        return tokens


def begin_of(seed: int) -> int:
    """Where in the cycle a seed's text begins: its low bits, mixed (Fibonacci hashing)."""
    return (seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 40
