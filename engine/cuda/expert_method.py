"""Products of experts on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.cuda.fp8_experts import CudaFp8Experts
from engine.cuda.fp8_products import has_fp8
from engine.kernels.experts.choice import apply_experts
from engine.kernels.experts.parts import ExpertMatrices, Gating
from engine.layers.experts import ExpertMethod, Experts, ExpertShape, ExpertWeights
from engine.layers.looped_experts import DenseExperts
from engine.layers.mxfp4 import Mxfp4Experts
from engine.layers.ops import Routing
from engine.layers.parallel import SplitError

# The tensor memory accelerator's alignment.
_ROW_BYTES = 16


class CudaExperts(DenseExperts):
    """Plain weights.

    Args:
        deterministic: have each token's result bitwise the same whatever else is in the step.
    """

    def __init__(self, *, deterministic: bool) -> None:
        self._deterministic = deterministic

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        """Raises SplitError if rows are not aligned as the tensor memory accelerator needs them."""
        held, unit = shape.matrix.in_features, _ROW_BYTES // torch.get_default_dtype().itemsize
        if held % unit:
            raise SplitError(
                f"{weights.layer_name}: a rank would hold {held} of each expert's channels; on a GPU it must "
                f"be a multiple of {unit}"
            )
        super().create_weights(weights, shape)

    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return _apply(experts, x, routing, "weight", None, deterministic=self._deterministic)


class CudaMxfp4Experts(Mxfp4Experts):
    """Weights of 4 bits, which become numbers of the model's dtype in registers. See CudaExperts."""

    def __init__(self, *, deterministic: bool) -> None:
        self._deterministic = deterministic

    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return _apply(experts, x, routing, "blocks", "scales", deterministic=self._deterministic)


def cuda_expert_methods(device: torch.device, *, deterministic: bool) -> Mapping[str, ExpertMethod]:
    """By the weights' number format; "fp8" is for matrices that are loaded one by one."""
    return {
        "": CudaExperts(deterministic=deterministic),
        "fp8": CudaFp8Experts(deterministic=deterministic, available=has_fp8(device)),
        "mxfp4": CudaMxfp4Experts(deterministic=deterministic),
    }


def _apply(
    experts: Experts,
    x: torch.Tensor,
    routing: Routing,
    weight: str,
    scales: str | None,
    *,
    deterministic: bool,
) -> torch.Tensor:
    def matrices(weights: ExpertWeights, bias: torch.Tensor | None) -> ExpertMatrices:
        own_scales = None if scales is None else weights.get_parameter(scales)
        return ExpertMatrices(weights.get_parameter(weight), own_scales, bias)

    activation = experts.activation
    result: torch.Tensor = apply_experts(
        x,
        routing.experts,
        routing.weights,
        matrices(experts.gate_up_proj, experts.gate_up_proj.bias),
        matrices(experts.down_proj, experts.down_bias),
        Gating(activation.kind, activation.alpha, activation.limit),
        deterministic=deterministic,
    )
    return result
