"""Products of experts on the CPU."""

from __future__ import annotations

import torch

from engine.cpu.linear_method import PackedCpuMethod
from engine.layers.experts import ExpertWeights
from engine.layers.looped_experts import DenseExperts, one_of


class PackedCpuExperts(DenseExperts):
    """Plain weights, each expert's repacked once as `PackedCpuMethod` repacks a linear layer's."""

    def finish_loading(self, weights: ExpertWeights) -> None:
        weight = weights.get_parameter("weight").detach()
        pack, hint = torch.ops.mkldnn._reorder_linear_weight, PackedCpuMethod.BATCH_HINT
        packed = [pack(weight[expert], hint) for expert in range(len(weight))]
        weights.packed = packed  # type: ignore[assignment]
        weights.register_parameter("weight", None)

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        packed = weights.packed[expert]  # type: ignore[index]
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, packed, one_of(bias, expert), "none", [], ""
        )
        return product
