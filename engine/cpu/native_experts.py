"""Products of experts whose matrices stay in the number format that the checkpoint has them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from engine.cpu.kernels.blocks import BLOCK_KINDS, BlockKind
from engine.cpu.kernels.library import NativeLibrary, PackedMatrix
from engine.cpu.native_linear import format_dtype
from engine.layers.experts import ExpertMethod, ExpertShape, ExpertWeights
from engine.layers.linear_method import FormatOf
from engine.layers.linear_weight import FeatureDim, LinearWeight
from engine.layers.looped_experts import LoopedExperts, one_of


class NativeExperts(LoopedExperts):
    """Native products where all matrices of a layer's experts have the same format; otherwise another
    method."""

    def __init__(
        self, native: NativeLibrary, otherwise: LoopedExperts, format_of: FormatOf | None = None
    ) -> None:
        self._native, self._otherwise, self._format_of = native, otherwise, format_of

    def for_checkpoint(self, format_of: FormatOf) -> ExpertMethod:
        return NativeExperts(self._native, self._otherwise, format_of)

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        kind = self._kind(weights, shape)
        weights.kind = kind  # type: ignore[assignment]
        if kind is None:
            self._otherwise.create_weights(weights, shape)
            return
        dtype, size = format_dtype(kind)
        rows, columns = shape.matrix.out_features, size.count(shape.matrix.in_features)
        data = torch.empty(shape.num_experts, rows, columns, dtype=dtype)
        inputs = FeatureDim(2, size.features, size.elements)
        weights.register_parameter("weight", LinearWeight.make(data, output=FeatureDim(1), input=inputs))

    def finish_loading(self, weights: ExpertWeights) -> None:
        kind = cast(BlockKind | None, weights.kind)
        if kind is None:
            self._otherwise.finish_loading(weights)
            return
        rows = weights.get_parameter("weight").detach().view(torch.uint8)
        columns = kind.num_columns(rows.shape[2])
        packed = [self._native.pack(kind, matrix, columns) for matrix in rows]
        weights.packed = packed  # type: ignore[assignment]
        weights.register_parameter("weight", None)

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if weights.kind is None:
            return self._otherwise.multiply(weights, expert, x, bias)
        packed = cast(Sequence[PackedMatrix], weights.packed)[expert]
        return self._native.multiply(x, packed, one_of(bias, expert))

    def _kind(self, weights: ExpertWeights, shape: ExpertShape) -> BlockKind | None:
        shards = weights.checkpoint_shards
        if self._format_of is None or not shards:
            return None
        formats = {self._format_of(weights.layer_name, shard) for shard in shards}
        return BLOCK_KINDS.get(formats.pop()) if len(formats) == 1 else None
