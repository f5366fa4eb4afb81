"""Root-mean-square layer normalisation (arXiv:1910.07467) with the residual addition beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.weights import LoadableModule


class RMSNorm(LoadableModule):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream to x, then normalises.

        Returns:
            (normalised sum, the sum itself, which is the new residual stream), both [T, hidden]. The given
            residual is overwritten.
        """
        residual = x if residual is None else residual.add_(x)
        return F.rms_norm(residual, self.weight.shape, self.weight, self.eps), residual
