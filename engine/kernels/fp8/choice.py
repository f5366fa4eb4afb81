"""Which product of e4m3 weights is used for how many tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton

from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.fp8.measured import BLOCKS, CHANNELS, ONE_TOKEN
from engine.kernels.fp8.one_token import OneTokenConfig, fp8_one_token
from engine.kernels.fp8.quantize import quantize
from engine.kernels.fp8.rows import fp8_rows
from engine.kernels.fp8.tiled import fp8_tiles
from engine.kernels.linear.matrix_vector import MAX_TOKENS, RowsConfig, one_token_rows
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig

Config = RowsConfig | OneTokenConfig | TileConfig

# The tensor memory accelerator's alignment, and that of torch's scaled product.
ALIGNMENT = 16
# Sums of the tensor cores are of so many inputs at most, or of a block's.
_BLOCK_K = 128
_FEW_TOKENS = 2
# Weights so small that a second launch, which quantizes the inputs, takes longer than what tiles save.
_SMALL_MATRIX = 1 << 22
# What was not measured: by tokens at most, with scales of outputs and in blocks.
_SMALL_TILES = {
    False: (
        (16, TileConfig(16, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (32, TileConfig(32, 64, 256, num_warps=4, num_stages=4, transposed=True)),
        (64, TileConfig(64, 64, _BLOCK_K, num_warps=4, num_stages=6)),
        (256, TileConfig(128, 64, _BLOCK_K, num_warps=4, num_stages=5)),
    ),
    True: (
        (16, TileConfig(16, 64, _BLOCK_K, num_warps=4, num_stages=6, transposed=True)),
        (32, TileConfig(32, 64, _BLOCK_K, num_warps=4, num_stages=6, transposed=True)),
        (64, TileConfig(64, 64, _BLOCK_K, num_warps=4, num_stages=6)),
        (256, TileConfig(64, 128, _BLOCK_K, num_warps=4, num_stages=4)),
    ),
}
_LARGE_TILE = TileConfig(64, 128, _BLOCK_K, num_warps=4, num_stages=4)
# From so many tokens on torch's product is the fastest where there is one.
_MANY_TOKENS = 128
# Multiprocessors of an H100 or H200. Fewer tiles than these are cut into as many shares, if they are long;
# adding up the shares of short ones takes as long as it saves, unless there are very few tiles.
_PROGRAMS = 132
_LONG = 8192
_FEW_TILES = 64
# For each token's result to be the same in any batch: an element of whole tiles depends on its rows alone.
_INVARIANT_TILES = (
    TileConfig(64, 64, _BLOCK_K, num_warps=4, num_stages=5),
    TileConfig(128, 128, _BLOCK_K, num_warps=8, num_stages=4),
)


@lru_cache(maxsize=4096)
def choose_one_token(n: int, k: int) -> OneTokenConfig:
    """How one token is multiplied by weights of [n, k] with scales of outputs."""
    return ONE_TOKEN.get((n, k)) or OneTokenConfig(4, num_warps=4, overlap=True)


def fits_one_token(matrix: Fp8Matrix, dtype: torch.dtype) -> bool:
    """Whether `choose_one_token` is for these weights and tokens of this kind."""
    return matrix.block is None and dtype.itemsize == 2 and matrix.codes.shape[1] % ALIGNMENT == 0


@lru_cache(maxsize=4096)
def choose_fp8(m: int, n: int, k: int, *, in_blocks: bool, torch_fits: bool) -> Config | None:
    """The fastest known way to multiply m tokens, which are quantized, by weights of [n, k]; None stands for
    torch's scaled product.

    Args:
        in_blocks: whether scales are of blocks.
        torch_fits: whether torch has a product for these operands.
    """
    table = BLOCKS if in_blocks else CHANNELS
    for most, config in table.get((n, k), ()):
        if m <= most and (config is not None or torch_fits):
            return config and replace(config, overlap=True)
    if m <= _FEW_TOKENS and n * k <= _SMALL_MATRIX:
        return replace(one_token_rows(n), overlap=True)
    if torch_fits and m >= _MANY_TOKENS:
        return None
    tile = next((tile for most, tile in _SMALL_TILES[in_blocks] if m <= most), _LARGE_TILE)
    return replace(tile, programs=_shares(m, n, k, tile), overlap=True)


def _shares(m: int, n: int, k: int, tile: TileConfig) -> int:
    """The programs that take equal shares; 0 for whole tiles."""
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    enough = _PROGRAMS if k >= _LONG else _FEW_TILES
    return 0 if tiles >= enough else _PROGRAMS


def torch_fits(matrix: Fp8Matrix, dtype: torch.dtype) -> bool:
    """Whether torch's scaled product can multiply by these weights."""
    aligned = all(size % ALIGNMENT == 0 for size in matrix.codes.shape)
    return aligned and matrix.block is None and dtype == torch.bfloat16


def can_multiply(matrix: Fp8Matrix, num_tokens: int) -> bool:
    """Whether there is a kernel for these weights and this number of tokens."""
    in_features = matrix.codes.shape[1]
    if matrix.block is not None:
        inputs = matrix.block[1]
        if inputs & (inputs - 1) or not (inputs % _BLOCK_K == 0 or inputs in (32, 64)):
            return False
    if matrix.input_group == 0:
        return num_tokens <= MAX_TOKENS
    return in_features % ALIGNMENT == 0


def multiply_fp8(
    x: torch.Tensor,
    matrix: Fp8Matrix,
    bias: torch.Tensor | None = None,
    *,
    config: Config,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] @ w [N, K].T + bias [N] -> [M, N] by a kernel, x quantized as the matrix says."""
    if isinstance(config, OneTokenConfig):
        return fp8_one_token(x, matrix, bias, config=config)
    if isinstance(config, RowsConfig):
        return fp8_rows(x, matrix, bias, config=config)
    codes, scales = quantize(x, matrix.input_group, matrix.input_scale)
    if matrix.block is not None and matrix.block[1] < config.block_k:
        config = replace(config, block_k=matrix.block[1])
    return fp8_tiles(codes, scales, matrix, bias, dtype=x.dtype, config=config, workspace=workspace)


def torch_product(
    codes: torch.Tensor,
    scales: torch.Tensor,
    matrix: Fp8Matrix,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """By torch, with sums on two levels too; codes and scales are what `quantize` made of x."""
    return torch._scaled_mm(
        codes,
        matrix.codes.t(),
        scale_a=scales.view(-1, 1),
        scale_b=matrix.scales.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )


def invariant_config(m: int) -> TileConfig:
    """The config with which a token's product is bitwise the same however many others there are."""
    return _INVARIANT_TILES[0] if m <= _INVARIANT_TILES[0].block_m else _INVARIANT_TILES[1]
