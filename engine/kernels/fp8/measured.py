"""Which product of e4m3 weights is the fastest, as measured on one H200: `python -m benchmarks.kernels.fp8`,
benchmarks/results/h200_fp8.json.
"""

from __future__ import annotations

from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import TileConfig

# (N, K) -> (most tokens, config), ascending. None stands for torch's scaled product. What is not here, and
# more tokens than here, are computed as choice.py says.
Table = dict[tuple[int, int], tuple[tuple[int, RowsConfig | TileConfig | None], ...]]

# With a scale for each output.
CHANNELS: Table = {}

# With scales of blocks of 128 x 128.
BLOCKS: Table = {}
