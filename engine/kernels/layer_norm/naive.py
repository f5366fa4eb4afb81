"""The definition of layer normalisation."""

from __future__ import annotations

import torch


def naive_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean(x)) / std(x) * weight + bias of each row, in fp32 and rounded once (arXiv:1607.06450).

    Args:
        x: [T, N].
        weight, bias: [N].
    """
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(x.dtype)


def naive_add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Adds x [T, N] to `residual` in place, rounds, and returns the norm of what `residual` now holds."""
    residual += x
    return naive_layer_norm(residual, weight, bias, eps)
