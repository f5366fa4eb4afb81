"""The definition of the products in this folder, in fp64."""

from __future__ import annotations

import torch


def naive_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], w [N, K], bias [N] -> [M, N] in fp64."""
    product = x.double() @ w.double().T
    return product if bias is None else product + bias.double()
