"""Number formats for tests: they only dequantize and multiply, but store their weights as real ones do."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear_method import LinearMethod, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight

GROUP = 16
BLOCK = 8
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight values from 0 to 15 in each int32, along one of two dimensions."""
    grouped = values.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = (grouped << _SHIFTS.to(torch.int64)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor, dim: int) -> torch.Tensor:
    """What `pack` packed."""
    return (((words.unsqueeze(-1) >> _SHIFTS) & 15).movedim(-1, dim + 1)).flatten(dim, dim + 1)


class PackedInt4(LinearMethod):
    """W[n, k] = (q[k, n] - 8) * scales[k / GROUP, n] * matrix_scale, packed along the input as in GPTQ or
    along the output as in AWQ. Every checkpoint matrix has a scale of its own for all of it."""

    def __init__(self, *, along_output: bool = False) -> None:
        self.packed_dim = 1 if along_output else 0

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        sizes = [shape.in_features, shape.out_features]
        sizes[self.packed_dim] //= 8
        factors = (1, 8) if self.packed_dim else (8, 1)
        words = LinearWeight.make(
            torch.empty(sizes, dtype=torch.int32),
            input=FeatureDim(0, factors[0]),
            output=FeatureDim(1, factors[1]),
        )
        scales = LinearWeight.make(
            torch.empty(shape.in_features // GROUP, shape.out_features),
            input=FeatureDim(0, GROUP),
            output=FeatureDim(1),
            is_scale=True,
        )
        matrix_scale = LinearWeight.make(torch.empty(len(shape.shards)), per_shard=True, is_scale=True)
        for name, weight in (("qweight", words), ("scales", scales), ("matrix_scale", matrix_scale)):
            layer.register_parameter(name, weight)
        layer.shard_sizes = shape.shard_sizes

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        scales = layer.scales.repeat_interleave(GROUP, 0)
        sizes = torch.tensor(layer.shard_sizes)
        weight = (unpack(layer.qweight, self.packed_dim) - 8) * scales
        weight = weight * layer.matrix_scale.repeat_interleave(sizes)
        return nn.functional.linear(x, weight.T.to(x.dtype), bias)

    def quantized(
        self, values: torch.Tensor, matrix_scale: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors of a checkpoint for a matrix of integers [N, K] from -8 to 7, with scales that are
        powers of two, and the matrix [N, K] that they stand for."""
        out_features, in_features = values.shape
        scales = 2.0 ** torch.randint(-3, 2, (in_features // GROUP, out_features))
        weight = torch.empty(out_features, in_features)
        for k in range(in_features):
            weight[:, k] = values[:, k] * scales[k // GROUP] * matrix_scale
        tensors = {
            "qweight": pack(values.T + 8, self.packed_dim),
            "scales": scales,
            "matrix_scale": torch.tensor(matrix_scale),
        }
        return tensors, weight


class BlockScaled(LinearMethod):
    """W[n, k] = weight[n, k] * scale_inv[n / BLOCK, k / BLOCK], as FP8 checkpoints have it. Blocks begin
    anew in each matrix; the last may be incomplete."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        output, inputs = FeatureDim(0, BLOCK), FeatureDim(1, BLOCK)
        weight = LinearWeight.make(
            torch.empty(shape.out_features, shape.in_features, dtype=torch.int8),
            output=FeatureDim(0),
            input=FeatureDim(1),
        )
        blocks = torch.empty(sum(map(output.count, shape.shard_sizes)), inputs.count(shape.in_features))
        scales = LinearWeight.make(blocks, output=output, input=inputs, is_scale=True)
        layer.register_parameter("weight", weight)
        layer.register_parameter("scale_inv", scales)
        layer.shard_sizes = shape.shard_sizes

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        scales = layer.scale_inv.repeat_interleave(BLOCK, 1)[:, : layer.weight.shape[1]]
        counts = [-(-size // BLOCK) for size in layer.shard_sizes]
        rows = [
            part.repeat_interleave(BLOCK, 0)[:size]
            for part, size in zip(scales.split(counts), layer.shard_sizes, strict=True)
        ]
        return nn.functional.linear(x, layer.weight * torch.cat(rows), bias)

    def quantized(
        self, values: torch.Tensor, matrix_scale: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """As PackedInt4's."""
        out_features, in_features = values.shape
        scales = (
            2.0 ** torch.randint(-3, 2, (-(-out_features // BLOCK), -(-in_features // BLOCK))) * matrix_scale
        )
        weight = torch.empty(out_features, in_features)
        for n in range(out_features):
            for k in range(in_features):
                weight[n, k] = values[n, k] * scales[n // BLOCK, k // BLOCK]
        return {"weight": values.to(torch.int8), "scale_inv": scales}, weight
