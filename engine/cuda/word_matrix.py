"""What kernels take of a layout in tiles of words."""

from __future__ import annotations

from engine.kernels.quantized.words import WordMatrix
from engine.quant.layouts.tiles import WordTiles


def word_matrix(layout: WordTiles) -> WordMatrix:
    """The layout's tensors and sizes."""
    n, k = layout.sizes
    return WordMatrix(layout.words, layout.groups, n, k, layout.bits, layout.group_size, layout.table)
