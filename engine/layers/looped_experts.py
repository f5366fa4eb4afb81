"""Experts that are computed one after the other: what experts are, and how CPUs compute them."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from engine.layers.experts import ExpertMethod, Experts, ExpertShape, ExpertWeights
from engine.layers.linear_weight import FeatureDim, LinearWeight
from engine.layers.ops import Routing


class LoopedExperts(ExpertMethod):
    """Computes one expert after the other, each for all of its tokens. Waits for the device: for CPUs."""

    @abstractmethod
    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [M, in] -> [M, out], by the matrix of one expert; bias [E, out]."""

    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        num_tokens, top_k = routing.experts.shape
        chosen = routing.experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
        # What each token gets of each of its experts: added up in the order in which they were chosen.
        made = x.new_empty(num_tokens * top_k, x.shape[1])
        begin = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            pairs = order[begin : begin + count]
            begin += count
            inputs = x[pairs // top_k]
            gate_up = self.multiply(experts.gate_up_proj, expert, inputs, experts.gate_up_proj.bias)
            activated = _activate(experts, gate_up)
            made[pairs] = self.multiply(experts.down_proj, expert, activated, experts.down_bias)
        parts = made.view(num_tokens, top_k, -1).float() * routing.weights.unsqueeze(-1)
        return parts.sum(1).to(x.dtype)


def _activate(experts: Experts, gate_up: torch.Tensor) -> torch.Tensor:
    activation = experts.activation
    if activation.kind != "clamped":
        return experts.ops.activate_and_mul(gate_up, activation.kind)
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(gate * activation.alpha) * (up + 1)


def one_of(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """One expert's bias."""
    return None if bias is None else bias[expert]


class DenseExperts(LoopedExperts):
    """Plain weights in the model's dtype, [E, N, K]."""

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        data = torch.empty(shape.num_experts, shape.matrix.out_features, shape.matrix.in_features)
        weight = LinearWeight.make(data, output=FeatureDim(1), input=FeatureDim(2))
        weights.register_parameter("weight", weight)

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return F.linear(x, weights.get_parameter("weight")[expert], one_of(bias, expert))
