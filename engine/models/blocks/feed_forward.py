"""The feed-forward block."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from engine.layers.step_context import StepContext
from engine.models.base import ModelContext


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202). Its channels are split over ranks."""

    def __init__(self, context: ModelContext, name: str, intermediate_size: int) -> None:
        super().__init__()
        config = context.config
        self.gate_up_proj = MergedColumnParallelLinear(
            f"{name}.gate_up_proj",
            config.hidden_size,
            {"gate": intermediate_size, "up": intermediate_size},
            bias=config.mlp_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        self.down_proj = RowParallelLinear(
            f"{name}.down_proj",
            intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            methods=context.linear_methods,
            parallel=context.parallel,
        )
        self.ops, self.activation = context.ops, config.activation

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        """x [T, hidden] -> what the layer adds to it, [T, hidden]."""
        activated = self.ops.activate_and_mul(self.gate_up_proj(x, context), self.activation)
        output: torch.Tensor = self.down_proj(activated, context)
        return output
