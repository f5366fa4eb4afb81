"""Root-mean-square layer normalisation (arXiv:1910.07467) with the residual addition beside it."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.weights import LoadableModule


class RMSNorm(LoadableModule):
    """x / rms(x) * weight over the last dimension."""

    eps: torch.Tensor

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float32), persistent=False)
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream to x, then normalises.

        Returns:
            (normalised sum, the sum itself, which is the new residual stream), both [T, hidden]. The given
            residual is overwritten.
        """
        residual = x if residual is None else residual.add_(x)
        return self.normalise(residual), residual

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden] in x's dtype, computed in fp32.

        Five operators on the CPU; torch.nn.functional.rms_norm takes eleven there.
        """
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(self.weight).to(x.dtype)
