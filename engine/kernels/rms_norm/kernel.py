"""RMSNorm in one pass over memory: a row stays in registers between its sum of squares and its scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.launch import wait_for_previous
from engine.kernels.norm_launch import launch_norm

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    num_rows,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program normalises ROWS rows of N channels; with a residual it adds to that first, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    mask = (row < num_rows) & (column < N)
    gain = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        stream = residual + row * residual_stride + column
        total = (values + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(stream, total, mask=mask)
        values = total.to(tl.float32)
    mean = tl.sum(values * values, axis=1, keep_dims=True) / N
    # Rounded before the weight multiplies, as Hugging Face models do.
    scaled = (values * tl.rsqrt(mean + eps)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + column, (scaled * gain).to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x / rms(x) * weight of each row (arXiv:1910.07467), computed in fp32.

    Args:
        x: [T, N]; rows may be strided, channels are contiguous.
        weight: [N].
        out: [T, N], written and returned; may be x itself. Allocated if absent.
    """
    return launch_norm(rms_norm_kernel, x, None, (weight,), eps, out)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds x to `residual` in place, rounded to its dtype, and returns the norm of what it then holds.

    Args:
        x, residual: [T, N]; rows may be strided, channels are contiguous. They must not overlap.
        weight: [N].
        out: [T, N], written and returned; may be x itself. Allocated if absent.
    """
    return launch_norm(rms_norm_kernel, x, residual, (weight,), eps, out)
