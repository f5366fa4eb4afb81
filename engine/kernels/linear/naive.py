"""The definitions of the products in this folder, in fp64."""

from __future__ import annotations

import torch


def naive_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], w [N, K], bias [N] -> [M, N] in fp64."""
    product = x.double() @ w.double().T
    return product if bias is None else product + bias.double()


def naive_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    w: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The root-mean-square norm of x + residual, times norm_weight, then the product with w.

    Args:
        x, residual: [M, K].
        norm_weight: [K].
        w: [N, K].

    Returns:
        (product [M, N] in fp64, x + residual [M, K] rounded to x's dtype: the sum that is normalised).
    """
    total = (x.double() + residual.double()).to(x.dtype)
    exact = total.double()
    rms = (exact.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return naive_linear(exact / rms * norm_weight.double(), w), total


def naive_silu_mul_linear(gate_up: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """gate_up [M, 2 * K] (gates, then ups), w [N, K] -> (silu(gate) * up) @ w.T [M, N] in fp64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return naive_linear(gate * gate.sigmoid() * up, w)
