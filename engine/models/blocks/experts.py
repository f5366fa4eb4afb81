"""The feed-forward block of a mixture of experts: a router, the experts, and one that all tokens use."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.experts import Experts
from engine.layers.linear import ColumnParallelLinear
from engine.layers.linear_weight import OutputShard
from engine.layers.parallel import FeatureRange
from engine.layers.step_context import StepContext
from engine.models.base import ModelContext
from engine.models.blocks.feed_forward import GatedMLP
from engine.models.config import ExpertsConfig
from engine.models.families import checkpoint_names


class ExpertMLP(nn.Module):
    """The sum of what a token's experts make of it, each as much as the router says (arXiv:1701.06538), and
    of what the shared expert makes of it, as much as a gate of its own says (Qwen2-MoE).

    Every rank has the whole router, and routes alike: all ranks see the same bytes.
    """

    def __init__(self, context: ModelContext, name: str, experts: ExpertsConfig) -> None:
        super().__init__()
        self.ops, self.top_k, self.renormalise = context.ops, experts.top_k, experts.renormalise
        self.router = _replicated(context, f"{name}.router", experts.num_experts, bias=experts.router_bias)
        self.experts = Experts(
            f"{name}.experts",
            num_experts=experts.num_experts,
            hidden_size=context.config.hidden_size,
            intermediate_size=experts.intermediate_size,
            activation=experts.activation,
            bias=experts.bias,
            tensors=checkpoint_names(context.config.architecture).experts,
            method=context.expert_methods[experts.weight_format],
            ops=context.ops,
            parallel=context.parallel,
        )
        self.shared_expert: GatedMLP | None = None
        if experts.shared_size:
            self.shared_expert = GatedMLP(context, f"{name}.shared_expert", experts.shared_size)
            self.shared_expert_gate = _replicated(context, f"{name}.shared_expert_gate", 1, bias=False)

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        """x [T, hidden] -> what the layer adds to it, [T, hidden]."""
        routing = self.ops.route(self.router(x, context), self.top_k, renormalise=self.renormalise)
        output: torch.Tensor = self.experts(x, routing)
        if self.shared_expert is not None:
            share = torch.sigmoid(self.shared_expert_gate(x, context))
            output = output + share * self.shared_expert(x, context)
        return output


def _replicated(context: ModelContext, name: str, out_features: int, *, bias: bool) -> ColumnParallelLinear:
    """A linear layer that each rank has the whole of."""
    outputs = OutputShard("", FeatureRange.whole(out_features))
    return ColumnParallelLinear(
        name, context.config.hidden_size, [outputs], bias=bias, methods=context.linear_methods
    )
