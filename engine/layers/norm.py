"""Root-mean-square layer normalisation (arXiv:1910.07467) with the residual addition beside it."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.ops import LayerOps
from engine.layers.weights import LoadableModule


class RMSNorm(LoadableModule):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, ops: LayerOps) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream to x, then normalises.

        Returns:
            (normalised sum, the sum itself, which is the new residual stream), both [T, hidden]. The given
            residual is overwritten; where there is none, x becomes it.
        """
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps), residual
