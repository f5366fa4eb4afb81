"""Products that were measured to beat torch's by more than the spread between two measurements: one H200,
`python -m benchmarks.kernels.linear`, benchmarks/results/h200_linear.json.
"""

from __future__ import annotations

from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import TileConfig

# (N, K) -> (most tokens, config), ascending. None stands for torch's, as does what is not here.
MEASURED: dict[tuple[int, int], tuple[tuple[int, RowsConfig | TileConfig | None], ...]] = {
    # llama8b qkv
    (6144, 4096): (
        (1, RowsConfig(4, num_warps=4)),
        (16, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True)),
    ),
    # llama8b o
    (4096, 4096): (
        (1, RowsConfig(2, num_warps=2)),
        (2, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True, programs=264)),
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True, programs=264)),
    ),
    # llama8b gate_up
    (28672, 4096): (
        (1, RowsConfig(1, num_warps=4)),
        (32, None),
        (64, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
        (128, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    ),
    # llama8b down
    (4096, 14336): (
        (1, RowsConfig(1, num_warps=2)),
        (2, RowsConfig(2, num_warps=4)),
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=132)),
    ),
    # llama8b head
    (128256, 4096): (
        (1, RowsConfig(1, num_warps=4)),
        (2, RowsConfig(4, num_warps=4)),
        (16, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
    ),
    # qwen06b qkv
    (4096, 1024): (
        (1, RowsConfig(2, num_warps=2)),
        (2, RowsConfig(2, num_warps=4)),
        (16, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True)),
    ),
    # qwen06b o
    (1024, 2048): (
        (1, RowsConfig(1, num_warps=4)),
        (4, RowsConfig(2, num_warps=4)),
    ),
    # qwen06b gate_up
    (6144, 1024): (
        (1, RowsConfig(2, num_warps=4)),
        (2, RowsConfig(4, num_warps=4)),
        (16, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True)),
    ),
    # qwen06b down
    (1024, 3072): (
        (1, RowsConfig(2, num_warps=4)),
        (2, RowsConfig(1, num_warps=4)),
        (4, RowsConfig(2, num_warps=4)),
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=132)),
    ),
    # qwen06b head
    (151936, 1024): (
        (1, RowsConfig(4, num_warps=4)),
        (16, TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
    ),
}
