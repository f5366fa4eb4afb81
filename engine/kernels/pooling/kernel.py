"""Sums of hidden states over chunks of prompts, in an order that no batch changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 16
BLOCK_SIZE = 128

# May be parts of a larger array, whose alignment must not matter to a compiler.
_SMALL_ARRAYS = ["rows", "begins", "ends", "continues", "divisors", "places"]


@dataclass(frozen=True, slots=True)
class PooledColumns:
    """Chunks of C requests, int32 on the device.

    Attributes:
        rows: whose sum each is added to, -1 for none, [C].
        begins, ends: its tokens among the step's, [C]; there may be none.
        continues: 1 where the row's sum is added to, 0 where it begins anew, [C].
        divisors: of the complete sum, [C].
        places: where in `out` the quotient goes, -1 where the sum is not complete, [C].
    """

    rows: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor
    continues: torch.Tensor
    divisors: torch.Tensor
    places: torch.Tensor


def pool_hidden(
    hidden: torch.Tensor, columns: PooledColumns, *, sums: torch.Tensor, out: torch.Tensor
) -> None:
    """Adds each chunk's hidden states to its row's sum, and writes out those that are complete.

    Args:
        hidden: of the step's tokens, [T, size] bf16, fp16 or fp32.
        columns: the chunks; of a row there is one.
        sums: [R, size] fp32.
        out: [P, size] fp32.
    """
    size = hidden.shape[1]
    _pool[(triton.cdiv(size, BLOCK_SIZE), len(columns.rows))](
        hidden,
        hidden.stride(0),
        columns.rows,
        columns.begins,
        columns.ends,
        columns.continues,
        columns.divisors,
        columns.places,
        sums,
        out,
        SIZE=size,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_SIZE=BLOCK_SIZE,
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=_SMALL_ARRAYS)
def _pool(
    hidden,
    hidden_stride,
    rows,
    begins,
    ends,
    continues,
    divisors,
    places,
    sums,
    out,
    SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Program (b, c): block b of the numbers of chunk c."""
    chunk = tl.program_id(1)
    row = tl.load(rows + chunk).to(tl.int64)
    if row < 0:
        return
    number = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    in_state = number < SIZE
    total = tl.load(sums + row * SIZE + number, mask=in_state, other=0.0)
    total = tl.where(tl.load(continues + chunk) != 0, total, 0.0)
    end = tl.load(ends + chunk)
    for first in range(tl.load(begins + chunk), end, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None]
        listed = (token < end) & in_state[None, :]
        x = tl.load(hidden + token * hidden_stride + number[None, :], mask=listed, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(sums + row * SIZE + number, total, mask=in_state)
    place = tl.load(places + chunk).to(tl.int64)
    if place >= 0:
        divisor = tl.load(divisors + chunk).to(tl.float32)
        tl.store(out + place * SIZE + number, tl.div_rn(total, divisor), mask=in_state)
