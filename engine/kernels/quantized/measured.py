"""The configs of products with quantized weights, by the kind of weights (`WordMatrix.kind`, "w8a8").

Those of MEASURED are llama8b's matrices on an H200, as `python -m benchmarks.kernels.quantized --tune`
prints them, with groups of 128 (int4), of K (int8) and of 64 (table4); int4 and int8 as in
benchmarks/results/h200_quantized.json, where the fastest for one token is taken up to 8. Those of table4
are of a run before that, whose kernels did not wait for the tensor cores between blocks of K. Configs whose
results were wrong for it are not among them; what waiting costs the others was not measured.
"""

from __future__ import annotations

from engine.kernels.linear.tiled import TileConfig
from engine.kernels.quantized.rows import WordRowsConfig
from engine.kernels.quantized.tiles import WordConfig

# Programs, for each of 132 multiprocessors.
_ONE, _TWO, _THREE, _FOUR, _SIX = 132, 264, 396, 528, 792

# (most tokens, config), ascending; for more tokens weights are dequantized first.
WORDS: tuple[tuple[int, WordConfig], ...] = (
    (8, WordConfig(8, 64, 4, 5, _FOUR)),
    (16, WordConfig(16, 128, 4, 4, _TWO)),
    (32, WordConfig(32, 128, 4, 4, _TWO)),
    (64, WordConfig(64, 64, 4, 4, _TWO)),
    (128, WordConfig(128, 64, 4, 3, _TWO)),
    (256, WordConfig(128, 128, 8, 3, _ONE)),
)
INT8: tuple[tuple[int, TileConfig], ...] = (
    (16, TileConfig(16, 64, 256, 4, 4, transposed=True, programs=_TWO)),
    (32, TileConfig(32, 64, 256, 4, 4, transposed=True, programs=_TWO)),
    (64, TileConfig(64, 64, 128, 4, 5, transposed=True, programs=_TWO)),
    (128, TileConfig(128, 64, 128, 4, 4)),
    (256, TileConfig(128, 128, 128, 8, 4)),
    (1 << 30, TileConfig(128, 256, 128, 8, 3)),
)
# (kind, N, K) -> for one token, where groups allow it.
ROWS: dict[tuple[str, int, int], WordRowsConfig] = {
    ("int4", 6144, 4096): WordRowsConfig(16, num_warps=8, overlap=True),
    ("int4", 4096, 4096): WordRowsConfig(16, num_warps=16, overlap=True),
    ("int4", 28672, 4096): WordRowsConfig(32, num_warps=4, overlap=True),
    ("int4", 4096, 14336): WordRowsConfig(32, num_warps=16, overlap=True),
    ("int8", 6144, 4096): WordRowsConfig(16, num_warps=16, overlap=True),
    ("int8", 4096, 4096): WordRowsConfig(16, num_warps=16),
    ("int8", 28672, 4096): WordRowsConfig(32, num_warps=4, overlap=True),
    ("int8", 4096, 14336): WordRowsConfig(16, num_warps=16),
}
# (kind, N, K) -> what was measured to be faster for these weights. For more tokens than the last entry's,
# words are dequantized first, and "w8a8" takes INT8's.
MEASURED: dict[tuple[str, int, int], tuple[tuple[int, WordConfig | TileConfig], ...]] = {
    ("int4", 6144, 4096): (
        (8, WordConfig(8, 64, 2, 4, _SIX)),
        (16, WordConfig(16, 128, 4, 4, _THREE)),
        (32, WordConfig(32, 128, 4, 3, _THREE)),
        (64, WordConfig(64, 64, 4, 3, _THREE)),
        (256, WordConfig(128, 64, 4, 3, _TWO)),
    ),
    ("int8", 6144, 4096): (
        (8, WordConfig(8, 64, 2, 4, _SIX)),
        (16, WordConfig(16, 128, 4, 4, _THREE)),
        (32, WordConfig(32, 128, 4, 3, _THREE)),
        (64, WordConfig(64, 64, 4, 3, _THREE)),
        (256, WordConfig(128, 64, 4, 3, _TWO)),
    ),
    ("table4", 6144, 4096): (
        (16, WordConfig(16, 64, 4, 6, _THREE)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 64, 4, 3, _ONE)),
    ),
    ("w8a8", 6144, 4096): (
        (16, TileConfig(16, 128, 256, 4, 4, transposed=True, programs=_ONE)),
        (32, TileConfig(32, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (64, TileConfig(64, 64, 128, 4, 5, transposed=True, programs=_TWO)),
        (128, TileConfig(128, 64, 128, 4, 4)),
        (1024, TileConfig(128, 128, 128, 8, 4)),
        (4096, TileConfig(128, 256, 128, 8, 3)),
    ),
    ("int4", 4096, 4096): (
        (8, WordConfig(8, 64, 4, 5, _FOUR)),
        (16, WordConfig(16, 128, 4, 4, _TWO)),
        (32, WordConfig(32, 64, 4, 4, _FOUR)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (256, WordConfig(128, 64, 4, 3, _TWO)),
        (1024, WordConfig(256, 128, 8, 3)),
    ),
    ("int8", 4096, 4096): (
        (8, WordConfig(8, 64, 4, 5, _FOUR)),
        (16, WordConfig(16, 64, 4, 5, _FOUR)),
        (32, WordConfig(32, 64, 4, 4, _FOUR)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (256, WordConfig(128, 64, 4, 3, _TWO)),
    ),
    ("table4", 4096, 4096): (
        (2, WordConfig(16, 128, 8, 4, _TWO)),
        (16, WordConfig(16, 64, 4, 4, _FOUR)),
        (32, WordConfig(32, 64, 4, 5, _TWO)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 64, 4, 3, _ONE)),
    ),
    ("w8a8", 4096, 4096): (
        (16, TileConfig(16, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (32, TileConfig(32, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (128, TileConfig(64, 64, 128, 4, 5, transposed=True, programs=_TWO)),
        (256, TileConfig(128, 128, 128, 8, 4)),
        (1024, TileConfig(128, 256, 128, 8, 4, programs=_ONE)),
        (4096, TileConfig(128, 256, 128, 8, 3)),
    ),
    ("int4", 28672, 4096): (
        (8, WordConfig(8, 64, 4, 5, _FOUR)),
        (16, WordConfig(16, 128, 4, 4, _THREE)),
        (32, WordConfig(32, 128, 4, 3, _THREE)),
        (64, WordConfig(64, 128, 8, 3)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 128, 8, 3, _ONE)),
    ),
    ("int8", 28672, 4096): (
        (8, WordConfig(8, 128, 4, 4, _THREE)),
        (16, WordConfig(16, 128, 4, 4, _THREE)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 128, 8, 3)),
        (256, WordConfig(128, 128, 8, 3)),
    ),
    ("table4", 28672, 4096): (
        (4, WordConfig(16, 128, 8, 4, _TWO)),
        (8, WordConfig(16, 64, 4, 4, _FOUR)),
        (16, WordConfig(16, 128, 8, 4, _TWO)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 128, 8, 3)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 128, 8, 3, _ONE)),
    ),
    ("w8a8", 28672, 4096): (
        (16, TileConfig(16, 128, 256, 4, 4, transposed=True, programs=_ONE)),
        (32, TileConfig(32, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (64, TileConfig(64, 64, 128, 4, 5, transposed=True, programs=_TWO)),
        (128, TileConfig(128, 64, 128, 4, 4)),
        (256, TileConfig(256, 128, 128, 8, 3)),
        (4096, TileConfig(128, 256, 128, 8, 3)),
    ),
    ("int4", 4096, 14336): (
        (8, WordConfig(8, 64, 4, 5, _FOUR)),
        (16, WordConfig(16, 128, 4, 4, _TWO)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 128, 8, 3, _ONE)),
        (1024, WordConfig(256, 128, 8, 3)),
    ),
    ("int8", 4096, 14336): (
        (8, WordConfig(8, 128, 4, 4, _TWO)),
        (16, WordConfig(16, 128, 4, 4, _TWO)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 128, 8, 4, _TWO)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 128, 8, 3, _ONE)),
        (1024, WordConfig(256, 128, 8, 3)),
    ),
    ("table4", 4096, 14336): (
        (16, WordConfig(16, 128, 8, 4, _TWO)),
        (32, WordConfig(32, 128, 4, 4, _TWO)),
        (64, WordConfig(64, 64, 4, 4, _TWO)),
        (128, WordConfig(128, 64, 4, 3, _TWO)),
        (256, WordConfig(256, 128, 8, 3, _ONE)),
    ),
    ("w8a8", 4096, 14336): (
        (16, TileConfig(16, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (32, TileConfig(32, 64, 256, 4, 4, transposed=True, programs=_TWO)),
        (64, TileConfig(64, 64, 128, 4, 5, transposed=True, programs=_TWO)),
        (128, TileConfig(64, 128, 128, 4, 4, programs=_TWO)),
        (256, TileConfig(128, 256, 128, 8, 4, programs=_ONE)),
        (1024, TileConfig(128, 256, 128, 8, 3)),
        (4096, TileConfig(256, 128, 128, 8, 3)),
    ),
}
