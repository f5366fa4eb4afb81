"""The configs of products with quantized weights, by the kind of weights (`WordMatrix.kind`, "w8a8")."""

from __future__ import annotations

from engine.kernels.linear.tiled import TileConfig
from engine.kernels.quantized.tiles import WordConfig

_TWO_PER_SM = 264
_THREE_PER_SM = 396

# (most tokens, config), ascending; for more tokens weights are dequantized first.
WORDS: tuple[tuple[int, WordConfig], ...] = (
    (16, WordConfig(16, num_stages=5, programs=_THREE_PER_SM)),
    (32, WordConfig(32, num_stages=5, programs=_TWO_PER_SM)),
    (64, WordConfig(64, num_stages=4, programs=_TWO_PER_SM)),
    (128, WordConfig(128, num_stages=4, programs=_TWO_PER_SM)),
)
INT8: tuple[tuple[int, TileConfig], ...] = (
    (16, TileConfig(16, 64, 256, num_warps=4, num_stages=5, transposed=True, programs=_TWO_PER_SM)),
    (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=_TWO_PER_SM)),
    (64, TileConfig(64, 64, 128, num_warps=4, num_stages=5, transposed=True, programs=_TWO_PER_SM)),
    (128, TileConfig(128, 128, 128, num_warps=8, num_stages=4)),
    (1 << 30, TileConfig(128, 256, 128, num_warps=8, num_stages=3)),
)
# (kind, N, K) -> what was measured to be faster for these weights. None stands for dequantizing.
MEASURED: dict[tuple[str, int, int], tuple[tuple[int, WordConfig | TileConfig | None], ...]] = {}
