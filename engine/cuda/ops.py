"""Layer arithmetic by the project's own Triton kernels."""

from __future__ import annotations

import torch

from engine.kernels.rms_norm.kernel import add_rms_norm, rms_norm
from engine.kernels.silu_and_mul.kernel import silu_and_mul
from engine.kernels.step_inputs.kernel import embed
from engine.layers.ops import LayerOps


class TritonLayerOps(LayerOps):
    """See LayerOps."""

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = embed(token_ids, weight)
        return rows

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed: torch.Tensor = rms_norm(x, weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        normed: torch.Tensor = add_rms_norm(x, residual, weight, eps)
        return normed

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = silu_and_mul(gate_up)
        return product
