"""Layer arithmetic with torch operators: for CPUs, and for any device without kernels of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.layers.ops import LayerOps, Routing


class TorchLayerOps(LayerOps):
    """See LayerOps. Keeps the norms' epsilons on the device, where one operator adds them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._eps: dict[float, torch.Tensor] = {}

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Five operators on the CPU; torch.nn.functional.rms_norm takes eleven there."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_of(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        return F.layer_norm(residual.add_(x), weight.shape, weight, bias, eps)

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)

    def route(self, logits: torch.Tensor, top_k: int, *, renormalise: bool) -> Routing:
        logits = logits.float()
        largest, experts = logits.topk(top_k, dim=-1)
        if renormalise:
            return Routing(experts, largest.softmax(-1))
        return Routing(experts, (largest - logits.logsumexp(-1, keepdim=True)).exp())

    def _eps_of(self, eps: float) -> torch.Tensor:
        if eps not in self._eps:
            self._eps[eps] = torch.tensor(eps, dtype=torch.float32, device=self.device)
        return self._eps[eps]
