"""A gated activation, read and written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, wait_for_previous

if TYPE_CHECKING:  # needed for annotations alone, and much slower to import than Triton is to compile
    import torch


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """In fp32."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    if ACTIVATION == "gelu":
        return gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    # 0.5 * (1 + tanh(z)) is sigmoid(2 * z), which neither overflows nor needs a function of its own.
    doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(doubled)


@triton.jit
def activate_and_mul_kernel(
    gate_up,
    out,
    gate_up_stride,
    out_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program computes BLOCK channels of one token; neighbouring programs, neighbouring channels."""
    blocks_per_row: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    column = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    source = gate_up + row * gate_up_stride + column
    wait_for_previous(OVERLAP)
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + N, mask=mask, other=0.0).to(tl.float32)
    result = activate(gate, ACTIVATION) * up
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=mask)


def activate_and_mul(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """activation(gate) * up (arXiv:2002.05202), in fp32 and rounded once.

    Args:
        gate_up: [T, 2 * n], gate then up; rows may be strided, channels are contiguous.
        activation: "silu", "gelu" or "gelu_tanh".
        out: [T, n], written and returned. Allocated if absent.
    """
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty((num_tokens, width))
    if num_tokens == 0:
        return out
    block = launch_block(num_tokens, width)
    activate_and_mul_kernel[(num_tokens * -(-width // block),)](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        N=width,
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=4,
        **overlap_options(),
    )
    return out


def launch_block(num_tokens: int, width: int) -> int:
    """BLOCK: small where few programs run, else as large as divides the width."""
    if num_tokens * width <= 1 << 18:
        return 512
    return 2048 if width % 2048 == 0 else 1024
