"""A sparse matrix of outliers, added to a product that is there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous

_BLOCK = 128
_BLOCK_M = 8


@triton.jit(do_not_specialize=["m"])
def add_outliers_kernel(
    x_ptr,  # [M, K]
    starts_ptr,  # int32 [N + 1]
    columns_ptr,  # int32 [count]
    values_ptr,  # fp32 [count]
    out_ptr,  # [M, N]
    m,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program adds the outliers of one output to BLOCK_M tokens."""
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    wait_for_previous(OVERLAP)
    if begin < end:
        held = tokens < m
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
        total = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
        for first in range(begin, end, BLOCK):
            places = first + tl.arange(0, BLOCK)
            columns = tl.load(columns_ptr + places, mask=places < end, other=0)
            values = tl.load(values_ptr + places, mask=places < end, other=0.0)
            x = tl.load(x_rows + columns[None, :], mask=held[:, None], other=0.0)
            total += x.to(tl.float32) * values[None, :]
        targets = out_ptr + tokens.to(tl.int64) * out_stride + row
        result = tl.load(targets, mask=held, other=0.0).to(tl.float32) + tl.sum(total, axis=1)
        tl.store(targets, result.to(out_ptr.dtype.element_ty), mask=held)


def add_outliers(
    x: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out [M, N] += x [M, K] times a sparse matrix [N, K] in CSR form.

    Args:
        row_starts: int32 [N + 1].
        columns, values: int32 and fp32 [count].
    """
    m, n = out.shape
    add_outliers_kernel[(n, triton.cdiv(m, _BLOCK_M))](
        x,
        row_starts,
        columns,
        values,
        out,
        m,
        x.stride(0),
        out.stride(0),
        BLOCK_M=_BLOCK_M,
        BLOCK=_BLOCK,
        num_warps=4,
        **overlap_options(),
    )
