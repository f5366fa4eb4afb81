"""Which kernels compute a layer's experts, by the number of tokens."""

from __future__ import annotations

import torch

from engine.kernels.experts.grouped import apply_by_tiles
from engine.kernels.experts.parts import ExpertMatrices, Gating
from engine.kernels.experts.rows import apply_by_rows
from engine.kernels.experts.sort import sort_pairs
from engine.kernels.linear.tiled import TileConfig

# Pairs of a token and an expert, for each expert, up to which they hardly share experts. In 4 bits a row
# costs more, and tiles pay sooner.
_MOST_ROWS = 1 / 4
_MOST_MXFP4_ROWS = 1 / 8

# (tile of the first product, tile of the second), by tokens of a tile.
_TILES = {
    16: (
        TileConfig(16, 64, 128, num_warps=4, num_stages=3, transposed=True),
        TileConfig(16, 64, 128, num_warps=4, num_stages=4, transposed=True),
    ),
    32: (
        TileConfig(32, 64, 128, num_warps=4, num_stages=3, transposed=True),
        TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True),
    ),
    64: (
        TileConfig(64, 128, 64, num_warps=8, num_stages=4),
        TileConfig(64, 128, 64, num_warps=8, num_stages=4),
    ),
    128: (
        TileConfig(128, 128, 64, num_warps=8, num_stages=4),
        TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    ),
}
# Weights are the first operand, since they come from registers.
_MXFP4_TILES = {
    16: (
        TileConfig(16, 64, 128, num_warps=4, num_stages=2, transposed=True),
        TileConfig(16, 64, 256, num_warps=4, num_stages=3, transposed=True),
    ),
    **{
        block_m: (TileConfig(block_m, 64, block_k, num_warps=4, num_stages=4, transposed=True),) * 2
        for block_m, block_k in ((32, 128), (64, 64), (128, 64))
    },
}
# Its products are no tensor core's.
_FP32_TILES = (TileConfig(16, 64, 32, num_warps=8, num_stages=3),) * 2
# With one tile for all numbers of tokens, a token's result is the same instructions' in every step.
_INVARIANT_BLOCK_M = 64


def takes_rows(num_pairs: int, num_experts: int, *, is_mxfp4: bool) -> bool:
    """Whether a program for each pair of token and expert is faster than tiles of each expert's tokens."""
    return num_pairs <= num_experts * (_MOST_MXFP4_ROWS if is_mxfp4 else _MOST_ROWS)


def choose_tiles(
    num_pairs: int, num_experts: int, dtype: torch.dtype, *, is_mxfp4: bool, deterministic: bool
) -> tuple[TileConfig, TileConfig]:
    """The tiles of the two products: as many tokens as an expert has on average, or more."""
    if dtype == torch.float32:
        return _FP32_TILES
    tiles = _MXFP4_TILES if is_mxfp4 else _TILES
    if deterministic:
        return tiles[_INVARIANT_BLOCK_M]
    return next((tiles[most] for most in tiles if num_pairs <= most * num_experts), tiles[max(tiles)])


def apply_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    gating: Gating,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it; naive.py defines it.

    Args:
        x: [T, H], last dimension contiguous, rows aligned to 16 bytes.
        experts: [T, k] int32.
        shares: what each expert's result is multiplied with, [T, k] fp32.
        gate_up: [E, 2 * I, H], rows of gate before those of up.
        down: [E, H, I].
        deterministic: have each token's result bitwise the same whatever else is in the step.

    Returns:
        [T, H] in x's dtype.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    num_experts = gate_up.weight.shape[0]
    is_mxfp4 = gate_up.scales is not None
    if not deterministic and takes_rows(experts.numel(), num_experts, is_mxfp4=is_mxfp4):
        return apply_by_rows(x, experts, shares, gate_up, down, gating)
    tiles = choose_tiles(
        experts.numel(),
        num_experts,
        x.dtype,
        is_mxfp4=is_mxfp4,
        deterministic=deterministic,
    )
    pairs = sort_pairs(experts, num_experts, tiles[0].block_m)
    return apply_by_tiles(x, shares, pairs, gate_up, down, gating, gate_up_tile=tiles[0], down_tile=tiles[1])
