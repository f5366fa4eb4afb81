"""Which kernel multiplies how many tokens by which quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from engine.kernels.linear.tiled import TileConfig
from engine.kernels.quantized.measured import INT8, MEASURED, ROWS, WORDS
from engine.kernels.quantized.rows import WordRowsConfig, fits_rows
from engine.kernels.quantized.tiles import WordConfig
from engine.kernels.quantized.words import WordMatrix

_FEW_TOKENS = 8
_MANY_ROWS, _LONG = 8192, 8192
# An element's value does not depend on which of them is used: each adds the same products of 16 along K, in
# the same order.
_INVARIANT = tuple(WordConfig(block_m, num_stages=4) for block_m in (16, 32, 64, 128))


def choose_product(matrix: WordMatrix, m: int) -> WordConfig | WordRowsConfig | None:
    """How m tokens are multiplied by weights in tiles of words; None for dequantizing them first."""
    if m == 1 and fits_rows(matrix):
        return one_token_rows(matrix.kind, matrix.n, matrix.k)
    return choose_words(matrix.kind, m, matrix.n, matrix.k)


@lru_cache(maxsize=4096)
def one_token_rows(kind: str, n: int, k: int) -> WordRowsConfig:
    """How one token is multiplied by weights [n, k] in tiles of words, row by row."""
    measured = ROWS.get((kind, n, k))
    if measured is not None:
        return measured
    # Many rows keep all multiprocessors busy by themselves; of few, warps share K.
    if n >= _MANY_ROWS:
        return WordRowsConfig(32, num_warps=4, overlap=True)
    return WordRowsConfig(32 if k >= _LONG else 16, num_warps=16, overlap=True)


@lru_cache(maxsize=4096)
def choose_words(kind: str, m: int, n: int, k: int) -> WordConfig | None:
    """How m tokens are multiplied by weights [n, k] in tiles of words on the tensor cores; None for
    dequantizing them first."""
    config = _first(MEASURED.get((kind, n, k), WORDS), m)
    assert config is None or isinstance(config, WordConfig)
    # Measured: starting early costs a product of one token 4 %, and gains one of sixteen 11 %.
    return config and replace(config, overlap=m > _FEW_TOKENS)


@lru_cache(maxsize=4096)
def choose_int8(m: int, n: int, k: int) -> TileConfig:
    """How m tokens of 8 bits are multiplied by weights [n, k] of 8 bits."""
    config = _first(MEASURED.get(("w8a8", n, k), ()), m) or _first(INT8, m)
    assert isinstance(config, TileConfig)
    return replace(config, overlap=True)


def invariant_words(m: int) -> WordConfig:
    """Tiles by which a token's result is bitwise the same however many others there are."""
    return next((config for config in _INVARIANT if m <= config.block_m), _INVARIANT[-1])


def _first(entries: Sequence[tuple[int, WordConfig | TileConfig]], m: int) -> WordConfig | TileConfig | None:
    return next((config for most, config in entries if m <= most), None)
