"""Experts with e4m3 weights on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, cast

import torch
from torch import nn

from engine.kernels.experts.parts import Gating
from engine.kernels.fp8.choice import ALIGNMENT
from engine.kernels.fp8.experts import Fp8ExpertMatrices, apply_fp8_experts
from engine.layers.experts import ExpertMethod, Experts, ExpertWeights
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import DenseMethod, LinearMethods, SameMethod
from engine.layers.ops import Routing
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.methods.experts import QuantizedExperts
from engine.quant.schemes import Activations
from pagewire.base.errors import ConfigError

# Inputs of a block that kernels take: what is multiplied at a time divides them.
_BLOCK_INPUTS = (32, 64, 128, 256)
_BLOCK_OUTPUTS = (32, 64, 128, 256)


class CudaFp8Experts(QuantizedExperts):
    """All experts of a layer in one launch for each product.

    Each matrix is loaded as a linear layer's; then they become one tensor. Where the checkpoint has scales
    for inputs, the largest of all experts' is used for all of them.

    Args:
        deterministic: have each token's result bitwise the same whatever else is in the step.
        available: whether the GPU has e4m3.
        methods: of each matrix, whose shard is such as "7.gate".
    """

    def __init__(
        self, *, deterministic: bool, available: bool = True, methods: LinearMethods | None = None
    ) -> None:
        super().__init__(methods or SameMethod(DenseMethod()))
        self._deterministic, self._available = deterministic, available

    def for_matrices(self, methods: LinearMethods) -> ExpertMethod:
        """Raises ConfigError if the GPU has no e4m3."""
        if not self._available:
            raise ConfigError(
                "the model's experts are in FP8, which needs a GPU of compute capability 8.9 or above; use "
                "--device cpu, or another checkpoint"
            )
        return CudaFp8Experts(deterministic=self._deterministic, methods=methods)

    def finish_loading(self, weights: ExpertWeights) -> None:
        """Raises ConfigError if there is no kernel for these matrices."""
        linears = cast(Sequence[LinearLayer], weights.linears)
        for linear in linears:
            linear.finish_loading()
        layouts = [cast(Sequence[Layout], getattr(linear, "layouts", ())) for linear in linears]
        del weights.linears
        matrices = _stacked(layouts, weights)
        weights.matrices = matrices  # type: ignore[assignment]
        # Which says what the experts weigh.
        for name, held in (("codes", matrices.codes), ("scales", matrices.scales)):
            weights.register_parameter(name, nn.Parameter(held, requires_grad=False))

    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        activation = experts.activation
        result: torch.Tensor = apply_fp8_experts(
            x,
            routing.experts,
            routing.weights,
            cast(Fp8ExpertMatrices, experts.gate_up_proj.matrices),
            cast(Fp8ExpertMatrices, experts.down_proj.matrices),
            Gating(activation.kind, activation.alpha, activation.limit),
            deterministic=self._deterministic,
        )
        return result


def _stacked(layouts: Sequence[Sequence[Layout]], weights: ExpertWeights) -> Fp8ExpertMatrices:
    """One matrix of each expert, [N, K], as [E, N, K]. Gate and up may differ in their inputs' scales."""
    first = layouts[0][0] if layouts[0] else None
    for parts in layouts:
        for part in parts:
            _require_kernel(part, first, weights.layer_name)
        if not parts or (len(parts) > 1 and isinstance(first, Fp8Blocks)):
            _refuse(weights.layer_name)
    every = cast(Sequence[Sequence[Fp8Channels | Fp8Blocks]], layouts)
    joined = [_codes([part.codes for part in parts]) for parts in every]
    codes = torch.stack([each.view(torch.uint8) for each in joined]).view(torch.float8_e4m3fn)
    scales = torch.stack([torch.cat([part.scales for part in parts]) for parts in every])
    block = first.block if isinstance(first, Fp8Blocks) else None
    given = [part.input_scale for parts in every for part in parts if isinstance(part, Fp8Channels)]
    static = [scale for scale in given if scale is not None]
    input_scale = torch.cat(static).amax().view(1) if static else None
    return Fp8ExpertMatrices(
        codes, scales, block, input_scale, None if weights.bias is None else weights.bias
    )


def _codes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.view(torch.uint8) for part in parts])


def _require_kernel(layout: Layout, first: Layout | None, where: str) -> None:
    """Raises ConfigError if there is no kernel for this layout, or if it is another one than the first's."""
    if type(layout) is not type(first) or not isinstance(layout, Fp8Channels | Fp8Blocks):
        _refuse(where)
    if layout.activations is Activations.NONE or layout.in_features % ALIGNMENT:
        _refuse(where)
    if isinstance(layout, Fp8Blocks):
        outputs, inputs = layout.block
        fits = outputs in _BLOCK_OUTPUTS and inputs in _BLOCK_INPUTS
        if not fits or layout.out_features % outputs:
            _refuse(where)


def _refuse(where: str) -> NoReturn:
    raise ConfigError(
        f"{where}: on GPUs, quantized experts are supported in MXFP4, and in FP8 with quantized activations, "
        "all in the same format; use --device cpu, or another checkpoint"
    )
