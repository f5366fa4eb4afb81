"""Layer arithmetic by the project's own Triton kernels."""

from __future__ import annotations

import torch

from engine.kernels.activate_and_mul.kernel import activate_and_mul
from engine.kernels.experts.route import route
from engine.kernels.layer_norm.kernel import add_layer_norm, layer_norm
from engine.kernels.rms_norm.kernel import add_rms_norm, rms_norm
from engine.kernels.step_inputs.kernel import embed
from engine.layers.ops import LayerOps, Routing


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

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        normed: torch.Tensor = layer_norm(x, weight, bias, eps)
        return normed

    def add_layer_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        normed: torch.Tensor = add_layer_norm(x, residual, weight, bias, eps)
        return normed

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        product: torch.Tensor = activate_and_mul(gate_up, activation)
        return product

    def route(self, logits: torch.Tensor, top_k: int, *, renormalise: bool) -> Routing:
        experts, weights = route(logits, top_k, renormalise=renormalise)
        return Routing(experts, weights)
