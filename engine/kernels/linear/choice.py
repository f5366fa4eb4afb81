"""Which product is used for how many tokens and which weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from engine.kernels.linear.matrix_vector import RowsConfig, matrix_vector, one_token_rows
from engine.kernels.linear.measured import MEASURED
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig, tiled_linear


@lru_cache(maxsize=4096)
def choose_linear(m: int, n: int, k: int) -> RowsConfig | TileConfig | None:
    """The fastest known way to multiply m tokens by weights of [n, k]; None stands for torch's own."""
    # One token's product was faster by our own kernel for every shape that was measured.
    fastest = one_token_rows(n) if m == 1 else None
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
    *,
    config: RowsConfig | TileConfig | None,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x [M, K] @ w [N, K].T + bias [N] -> [M, N] in the way that `choose_linear` returned."""
    match config:
        case RowsConfig():
            return matrix_vector(x, w, bias, config=config)
        case TileConfig():
            return tiled_linear(x, w, bias, config=config, workspace=workspace)
    return F.linear(x, w, bias)
