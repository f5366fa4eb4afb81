"""The definition of RMSNorm as Hugging Face models compute it, rounding included."""

from __future__ import annotations

import torch


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight of each row (arXiv:1910.07467).

    The mean is taken in fp32; the quotient is rounded to x's dtype before the weight multiplies it.

    Args:
        x: [T, N].
        weight: [N].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def naive_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x [T, N] to `residual` in place, rounds, and returns the norm of what `residual` now holds."""
    residual += x
    return naive_rms_norm(residual, weight, eps)
