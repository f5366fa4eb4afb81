"""What each parameter of a linear layer holds of a matrix, from which follows how it is loaded and split."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from engine.layers.parallel import FeatureRange, SplitError
from engine.layers.weights import copy_checked, take_part


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One checkpoint matrix inside a fused layer.

    Attributes:
        name: of the shard; "" where the layer is not fused.
        held: its output features on this rank.
    """

    name: str
    held: FeatureRange


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """Where one checkpoint matrix belongs in a rank's layer.

    Attributes:
        index: its place among the layer's shards.
        outputs, inputs: its features on this rank.
        sizes_before: output features, on this rank, of each shard before it.
    """

    index: int
    outputs: FeatureRange
    inputs: FeatureRange
    sizes_before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FeatureDim:
    """A dimension of a parameter along which features are counted.

    Each `features` consecutive features take `elements` elements. Both are 1 in a plain matrix; 8 features
    take 1 element where an int32 packs 8 values of 4 bits, 32 take 3 where they have 3 bits; as many as a
    group or a block has take 1 in a table of scales; 256 take 144 where bytes hold GGML's Q4_K blocks. The
    last block of a matrix may be incomplete.

    Attributes:
        dim: the dimension of the checkpoint's tensor.
    """

    dim: int
    features: int = 1
    elements: int = 1

    def count(self, features: int) -> int:
        """The elements that so many features take."""
        return -(-features // self.features) * self.elements

    def take(self, tensor: torch.Tensor, held: FeatureRange) -> torch.Tensor:
        """What a rank holds of a checkpoint tensor."""
        first = held.first // self.features * self.elements
        return take_part(tensor, self.dim, first, self.count(held.size), self.count(held.total))

    def require_uncut(self, held: FeatureRange, where: str) -> None:
        """Raises SplitError if a rank's features begin or end inside a block."""
        end = held.first + held.size
        if held.first % self.features or (end % self.features and end != held.total):
            raise SplitError(
                f"{where} keeps {self.features} features together, and a rank's part of {held.total}, from "
                f"{held.first} to {end}, cuts through them; use fewer tensor-parallel ranks"
            )


class LinearWeight(nn.Parameter):
    """A parameter of a linear layer that knows how its dimensions count output and input features.

    Attributes:
        output, input: the dimension that counts them; None where the parameter does not extend along them.
        per_shard: whether there is an entry for each shard of a fused layer, along a first dimension that
            the checkpoint's tensors lack: such as one scale for each matrix. There is one entry where the
            layer is not fused.
        is_scale: whether its values multiply others: never zero or negative.
        file_name: what checkpoints call it where that cannot be a parameter's name, such as "weight.absmax".
    """

    output: FeatureDim | None
    input: FeatureDim | None
    per_shard: bool
    is_scale: bool
    file_name: str = ""

    @staticmethod
    def make(
        data: torch.Tensor,
        *,
        output: FeatureDim | None = None,
        input: FeatureDim | None = None,
        per_shard: bool = False,
        is_scale: bool = False,
    ) -> LinearWeight:
        """A parameter of inference only, around `data`."""
        weight = LinearWeight(data, requires_grad=False)
        weight.output, weight.input = output, input
        weight.per_shard, weight.is_scale = per_shard, is_scale
        return weight

    def require_loadable(self, parts: Collection[MatrixPart], where: str) -> None:
        """Checks that every shard has a place of its own here.

        Raises:
            SplitError: shards would overwrite each other, or a rank's part cuts through what is stored
                together; the message begins with `where`.
        """
        if len(parts) > 1 and self.output is None and not self.per_shard:
            raise SplitError(
                f"{where} has neither a dimension of output features nor an entry for each shard: its "
                f"{len(parts)} shards would overwrite each other"
            )
        for part in parts:
            for dim, held in ((self.output, part.outputs), (self.input, part.inputs)):
                if dim is not None:
                    dim.require_uncut(held, where)
        if self.per_shard:
            assert self.output is None, where
            assert len(self) == len(parts), where
        elif self.output is not None:
            needed = sum(self.output.count(part.outputs.size) for part in parts)
            assert self.shape[self.output.dim] == needed, where

    def load(self, tensor: torch.Tensor, part: MatrixPart) -> None:
        """Copies this rank's part of a checkpoint tensor to its place. A single number may have any shape.

        Raises:
            ShardError: the tensor's shape is not what is needed.
        """
        target = self.data
        if self.per_shard:
            target = target[part.index]
        if self.output is not None:
            first = sum(self.output.count(size) for size in part.sizes_before)
            target = target.narrow(self.output.dim, first, self.output.count(part.outputs.size))
            tensor = self.output.take(tensor, part.outputs)
        if self.input is not None and part.inputs.size < part.inputs.total:
            tensor = self.input.take(tensor, part.inputs)
        if tensor.numel() == target.numel() == 1:
            tensor = tensor.reshape(target.shape)
        copy_checked(target, tensor)
