"""The arithmetic between matrix products: one seam, one implementation for each kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token uses.

    Attributes:
        experts: [T, k], from the likeliest on; no expert twice for a token.
        weights: what the results of each are multiplied with, [T, k] fp32.
    """

    experts: torch.Tensor
    weights: torch.Tensor


class LayerOps(ABC):
    """What layers compute besides matrix products and attention. Has no state that a step could see."""

    @abstractmethod
    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """token_ids [T], weight [vocab, hidden] -> rows of the weight, [T, hidden]."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension (arXiv:1910.07467), computed in fp32, in x's dtype."""

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds x to the residual stream [T, hidden], in place, and returns the norm of the sum."""

    @abstractmethod
    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """(x - mean(x)) / std(x) * weight + bias over the last dimension (arXiv:1607.06450), computed in
        fp32, in x's dtype."""

    @abstractmethod
    def add_layer_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Adds x to the residual stream [T, hidden], in place, and returns the norm of the sum."""

    def scale(self, x: torch.Tensor, factor: float, soft_cap: float = 0.0) -> torch.Tensor:
        """x [T, size] * factor; under a soft cap, soft_cap * tanh(that / soft_cap)."""
        x = x if factor == 1.0 else x * factor
        return torch.tanh(x / soft_cap) * soft_cap if soft_cap else x

    @abstractmethod
    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """[T, 2 * n], gate then up -> activation(gate) * up, [T, n] (arXiv:2002.05202).

        Args:
            activation: "silu", "gelu", or "gelu_tanh", which approximates it by a hyperbolic tangent.
        """

    @abstractmethod
    def route(self, logits: torch.Tensor, top_k: int, *, renormalise: bool) -> Routing:
        """The `top_k` experts with the largest logits [T, E], weighted by the softmax of all of them in fp32.

        Args:
            renormalise: whether a token's weights add up to 1: the softmax is then that of its own experts.
        """
