"""The definitions of the products in this folder, in fp64."""

from __future__ import annotations

import torch


def naive_multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times what quantized weights stand for, w [N, K]; bias [N] -> [M, N] in fp64."""
    product = x.double() @ w.double().T
    return product if bias is None else product + bias.double()


def naive_quantize(
    x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> int8 [M, K] and scales fp32 [M, 1], or [1] if there is one.

    Each token's scale is its largest magnitude over 127, unless one is given; a zero point is added.
    """
    values = x.float()
    if scale is None:
        # Torch multiplies by the reciprocal of a number on a GPU, and divides by a tensor.
        scales = (values.abs().amax(-1, keepdim=True) / values.new_tensor(127.0)).clamp(min=1e-10)
        return (values / scales).round().to(torch.int8), scales
    whole = (values / scale).round()
    return (whole if zero is None else whole + zero).clamp(-128, 127).to(torch.int8), scale


def naive_int8(
    codes: torch.Tensor,
    input_scales: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 codes [M, K], which are `zero` too large, times int8 w [N, K], in fp64; scales [M, 1] and [N]."""
    inputs = codes.double() if zero is None else codes.double() - zero
    return inputs @ w.double().T * input_scales * scales
