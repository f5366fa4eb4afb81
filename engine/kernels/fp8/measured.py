"""Which product of e4m3 weights is the fastest, as measured on one H200: `python -m benchmarks.kernels.fp8`,
benchmarks/results/h200_fp8.json and, for fewer numbers of tokens and more configs, h200_fp8_2.json.
"""

from __future__ import annotations

from engine.kernels.fp8.one_token import OneTokenConfig
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import TileConfig

# (N, K) -> (most tokens, config), ascending. None stands for torch's scaled product. What is not here, and
# more tokens than here, are computed as choice.py says.
Table = dict[tuple[int, int], tuple[tuple[int, RowsConfig | TileConfig | None], ...]]

# (N, K) -> for one token, with a scale for each output.
ONE_TOKEN: dict[tuple[int, int], OneTokenConfig] = {
    (6144, 4096): OneTokenConfig(4, num_warps=4, overlap=True),
    (4096, 4096): OneTokenConfig(4, num_warps=8, overlap=True),
    (28672, 4096): OneTokenConfig(4, num_warps=1, overlap=True),
    (4096, 14336): OneTokenConfig(4, num_warps=4, overlap=True),
}

# With a scale for each output.
CHANNELS: Table = {
    # llama8b qkv
    (6144, 4096): (
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6, transposed=True)),
        (128, TileConfig(128, 64, 128, num_warps=4, num_stages=5)),
        (8192, None),
    ),
    # llama8b o
    (4096, 4096): (
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6)),
        (256, TileConfig(128, 64, 128, num_warps=4, num_stages=5)),
        (8192, None),
    ),
    # llama8b gate_up
    (28672, 4096): (
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
        (8192, None),
    ),
    # llama8b down
    (4096, 14336): (
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True, programs=132)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6, programs=264)),
        (128, TileConfig(128, 128, 128, num_warps=8, num_stages=4, programs=132)),
        (8192, None),
    ),
}

# With scales of blocks of 128 x 128.
BLOCKS: Table = {
    # llama8b qkv
    (6144, 4096): (
        (8, TileConfig(16, 64, 128, num_warps=4, num_stages=6, transposed=True)),
        (16, TileConfig(16, 128, 128, num_warps=4, num_stages=5, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=6, transposed=True, programs=264)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6)),
        (256, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
        (1024, TileConfig(128, 64, 128, num_warps=4, num_stages=3)),
        (8192, TileConfig(64, 128, 128, num_warps=4, num_stages=3)),
    ),
    # llama8b o
    (4096, 4096): (
        (16, TileConfig(16, 128, 128, num_warps=4, num_stages=5, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=6, transposed=True, programs=132)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6)),
        (256, TileConfig(128, 64, 128, num_warps=4, num_stages=5)),
        (1024, TileConfig(128, 128, 128, num_warps=8, num_stages=4)),
        (4096, TileConfig(64, 128, 128, num_warps=4, num_stages=3)),
        (8192, TileConfig(128, 128, 128, num_warps=8, num_stages=4)),
    ),
    # llama8b gate_up
    (28672, 4096): (
        (16, TileConfig(16, 128, 128, num_warps=4, num_stages=5, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=6, transposed=True, programs=264)),
        (128, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
        (1024, TileConfig(64, 128, 128, num_warps=4, num_stages=3)),
        (4096, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
        (8192, TileConfig(128, 128, 128, num_warps=8, num_stages=4)),
    ),
    # llama8b down
    (4096, 14336): (
        (16, TileConfig(16, 128, 128, num_warps=4, num_stages=5, transposed=True, programs=132)),
        (32, TileConfig(32, 64, 128, num_warps=4, num_stages=6, transposed=True, programs=264)),
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=6, programs=264)),
        (256, TileConfig(128, 128, 128, num_warps=8, num_stages=4, programs=132)),
        (8192, TileConfig(64, 128, 128, num_warps=4, num_stages=4)),
    ),
}
