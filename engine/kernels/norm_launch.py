"""How kernels that normalise rows are launched: a row, or a few, for each program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton

from engine.kernels.launch import overlap_options

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch

# With fewer rows than this every row gets a program of its own, for latency; with more, narrow rows share
# one, so that enough bytes are in flight per program. Both variants are compiled at most once per width.
_MANY_ROWS = 2048


def launch_norm(
    kernel: triton.JITFunction,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    eps: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Normalises the rows of x [T, N] and returns `out` [T, N], which is allocated if absent.

    Args:
        kernel: takes x, the residual, the weights, out, the number of rows, the strides of x, the residual
            and out, and eps, in this order.
        residual: [T, N]; what x is added to, in place, before the sum is normalised.
        weights: each [N], or None.
    """
    num_rows, width = x.shape
    if out is None:
        out = x.new_empty((num_rows, width))
    if num_rows == 0:
        return out
    block, rows, num_warps = launch_shape(num_rows, width)
    kernel[(-(-num_rows // rows),)](
        x,
        residual,
        *weights,
        out,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        N=width,
        BLOCK_N=block,
        ROWS=rows,
        **overlap_options(),
        num_warps=num_warps,
    )
    return out


def launch_shape(num_rows: int, width: int) -> tuple[int, int, int]:
    """(BLOCK_N, ROWS, num_warps) for so many rows of so many channels.

    A row is spread over as many threads however many rows there are, so that its sum is taken in the same
    order: a request's result does not depend on what else is in its step.
    """
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // 256, 1), max(block // 512, 8), 16)
    rows = min(4096 // block, 4) if num_rows >= _MANY_ROWS and 256 <= block <= 2048 else 1
    return block, rows, num_warps
