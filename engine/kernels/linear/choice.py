"""Which product is used for how many tokens and which weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton

from engine.kernels.linear.matrix_vector import RowsConfig, default_rows, matrix_vector
from engine.kernels.linear.measured import MEASURED
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig, tiled_linear

# Of an H100 or H200.
MULTIPROCESSORS = 132
SMALL_BATCH = 16
MEDIUM_BATCH = 256


@lru_cache(maxsize=4096)
def choose_linear(m: int, n: int, k: int) -> RowsConfig | TileConfig | None:
    """The fastest known way to multiply m tokens by weights of [n, k]; None stands for torch's own."""
    # One token's product was faster by our own kernel for every shape that was measured.
    fastest = default_rows(m, n) if m == 1 else None
    for most, config in MEASURED.get((n, k), ()):
        if m <= most:
            fastest = config
            break
    # Measured one by one. Among the other kernels of a model it is faster to overlap with them.
    return fastest and replace(fastest, overlap=True)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    config: RowsConfig | TileConfig | None,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] @ w [N, K].T + bias [N] -> [M, N] in the way that `choose_linear` returned."""
    match config:
        case RowsConfig():
            return matrix_vector(x, w, bias, out, config=config)
        case TileConfig():
            return tiled_linear(x, w, bias, out, config=config, workspace=workspace)
    if out is None:
        return F.linear(x, w, bias)
    if bias is None:
        return torch.mm(x, w.T, out=out)
    return torch.addmm(bias, x, w.T, out=out)


def small_batch_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] @ w [N, K].T + bias [N] -> [M, N] for up to SMALL_BATCH tokens, bound by reading weights."""
    m, (n, k) = x.shape[0], w.shape
    assert m <= SMALL_BATCH, f"{m} tokens, at most {SMALL_BATCH} are supported"
    return linear(x, w, bias, out, config=small_batch_config(m, n, k), workspace=workspace)


def medium_batch_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] @ w [N, K].T + bias [N] -> [M, N] for up to MEDIUM_BATCH tokens, in equal shares."""
    m, (n, k) = x.shape[0], w.shape
    assert m <= MEDIUM_BATCH, f"{m} tokens, at most {MEDIUM_BATCH} are supported"
    return linear(x, w, bias, out, config=medium_batch_config(m, n, k), workspace=workspace)


def small_batch_config(m: int, n: int, k: int) -> RowsConfig | TileConfig:
    """A plausible config where none was measured: multiply-adds up to 4 tokens, then tensor cores."""
    if m <= 4:
        return default_rows(m, n)
    return in_shares(TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True), m, n, k, per_sm=2)


def medium_batch_config(m: int, n: int, k: int) -> TileConfig:
    """A plausible config where none was measured."""
    if m <= 32:
        config = TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True)
        return in_shares(config, m, n, k, per_sm=2)
    if m <= 64:
        return in_shares(TileConfig(64, 128, 64, num_warps=4, num_stages=4), m, n, k, per_sm=2)
    return in_shares(TileConfig(128, 128, 64, num_warps=8, num_stages=5), m, n, k, per_sm=1)


def in_shares(config: TileConfig, m: int, n: int, k: int, *, per_sm: int) -> TileConfig:
    """The config with as many programs as run at once, but with at least two blocks of K for each."""
    blocks = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) * triton.cdiv(k, config.block_k)
    programs = max(1, min(per_sm * MULTIPROCESSORS, blocks // 2))
    return replace(config, programs=programs)
