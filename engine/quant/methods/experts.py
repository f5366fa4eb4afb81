"""Quantized experts: each matrix of each expert is a linear layer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from engine.layers.experts import ExpertShape, ExpertWeights
from engine.layers.linear import LinearLayer, SeparateProducts
from engine.layers.linear_method import LinearMethods, LinearShape
from engine.layers.looped_experts import LoopedExperts, one_of


class QuantizedExperts(LoopedExperts):
    """Computes one expert after the other, by the methods that its matrices have.

    Args:
        methods: of each matrix, whose shard is such as "7.gate".
    """

    def __init__(self, methods: LinearMethods) -> None:
        self._methods = methods

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        """Raises SplitError if a format has no place for this rank's part."""
        experts = (self._expert(weights, shape.matrix, expert) for expert in range(shape.num_experts))
        weights.linears = nn.ModuleList(experts)

    def _expert(self, weights: ExpertWeights, matrix: LinearShape, expert: int) -> LinearLayer:
        shards = tuple(replace(shard, name=f"{expert}.{shard.name}") for shard in matrix.shards)
        chosen = [self._methods.for_matrix(weights.layer_name, shard.name) for shard in shards]
        same = all(method == chosen[0] for method in chosen)
        method = chosen[0] if same else SeparateProducts(chosen)
        return LinearLayer(weights.layer_name, LinearShape(shards, matrix.inputs), method, bias=False)

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        linear = cast(Sequence[LinearLayer], weights.linears)[expert]
        return linear.method.apply(linear, x, one_of(bias, expert))
