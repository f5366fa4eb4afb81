"""RMSNorm in one pass over memory: a row stays in registers between its sum of squares and its scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch

# With fewer rows than this every row gets a program of its own, for latency; with more, narrow rows share
# one, so that enough bytes are in flight per program. Both variants are compiled at most once per width.
_MANY_ROWS = 2048


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
    return _launch(x, None, weight, eps, out)


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
    return _launch(x, residual, weight, eps, out)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    num_rows, width = x.shape
    if out is None:
        out = x.new_empty((num_rows, width))
    if num_rows == 0:
        return out
    block, rows, num_warps = launch_shape(num_rows, width)
    rms_norm_kernel[(-(-num_rows // rows),)](
        x,
        residual,
        weight,
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
