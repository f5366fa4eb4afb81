"""Products of quantized experts on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from engine.cuda.expert_method import CudaExperts
from engine.cuda.word_matrix import word_matrix
from engine.kernels.experts.parts import Gating
from engine.kernels.quantized.experts import ExpertWords, apply_word_experts
from engine.kernels.quantized.words import WordMatrix
from engine.layers.experts import Experts, ExpertWeights
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearMethods
from engine.layers.linear_weight import LinearWeight
from engine.layers.ops import Routing
from engine.quant.layouts.base import Layout
from engine.quant.layouts.tiles import WordTiles
from engine.quant.methods.experts import QuantizedExperts
from pagewire.base.errors import ConfigError


class CudaQuantizedExperts(QuantizedExperts):
    """Each expert's matrices are read by their own methods. When they are there, those of a layer become one
    stack: integers in tiles of words, or plain weights where the checkpoint has them in full precision.

    Args:
        deterministic: have each token's result bitwise the same whatever else is in the step.
    """

    def __init__(self, methods: LinearMethods, *, deterministic: bool) -> None:
        super().__init__(methods)
        self._deterministic = deterministic
        self._plain = CudaExperts(deterministic=deterministic)

    def finish_loading(self, weights: ExpertWeights) -> None:
        """Raises ConfigError if the experts' formats differ, or there is no kernel for theirs."""
        linears = cast(Sequence[LinearLayer], weights.linears)
        for linear in linears:
            linear.finish_loading()
        plain = [linear._parameters.get("weight") for linear in linears]
        if all(weight is not None for weight in plain):
            stack = torch.stack([cast(torch.Tensor, weight).data for weight in plain])
            weights.register_parameter("weight", LinearWeight.make(stack))
        else:
            layouts = [getattr(linear, "layouts", ()) for linear in linears]
            weights.words = stacked(layouts, weights.layer_name)  # type: ignore[assignment]
        del weights.linears

    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if not hasattr(gate_up, "words"):
            return self._plain.apply(experts, x, routing)
        activation = experts.activation
        result: torch.Tensor = apply_word_experts(
            x,
            routing.experts,
            routing.weights,
            ExpertWords(cast(WordMatrix, gate_up.words), gate_up.bias),
            ExpertWords(cast(WordMatrix, down.words), experts.down_bias),
            Gating(activation.kind, activation.alpha, activation.limit),
            deterministic=self._deterministic,
        )
        return result


def stacked(layouts: Sequence[Sequence[Layout]], where: str) -> WordMatrix:
    """The matrices of all experts, one expert's below the other's.

    Args:
        layouts: of each expert.

    Raises:
        ConfigError: they are not alike, or in no form that there is a kernel for.
    """
    tiles = [each[0] for each in layouts if len(each) == 1 and isinstance(each[0], WordTiles)]
    first = word_matrix(tiles[0]) if tiles else None
    if first is None or len(tiles) < len(layouts) or not _are_alike(tiles) or not first.fits_tiles:
        raise ConfigError(
            f"{where}: on a GPU the quantized experts of a layer must be integers of 2, 3, 4 or 8 bits, in "
            "the same format, with no order of their inputs, in groups of a multiple of 32; use --device cpu"
        )
    words = torch.cat([each.words for each in tiles])
    groups = torch.cat([each.groups for each in tiles])
    return replace(first, words=words, groups=groups)


def _are_alike(tiles: Sequence[WordTiles]) -> bool:
    kinds = {(each.bits, each.group_size, each.sizes) for each in tiles}
    return len(kinds) == 1 and all(each.order is None and each.table is None for each in tiles)
