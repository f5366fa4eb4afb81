"""How a linear layer stores its weights and multiplies by them.

The layers in linear.py know which part of a matrix they hold; a LinearMethod knows its number format. A
quantized format is another LinearMethod, and models do not change. LinearMethods chooses one for each layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.linear_weight import FeatureDim, LinearWeight, MatrixPart, OutputShard
from engine.layers.parallel import FeatureRange


@dataclass(frozen=True, slots=True)
class LinearShape:
    """What this rank holds of a linear layer: [sum of the shards' sizes, inputs.size].

    Attributes:
        shards: the checkpoint matrices that the layer's output is made of, in order; one without a name
            where the layer is not fused.
        inputs: the input features, the same for all of them.
    """

    shards: tuple[OutputShard, ...]
    inputs: FeatureRange

    @property
    def in_features(self) -> int:
        """Input features on this rank."""
        return self.inputs.size

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Output features of each shard on this rank."""
        return tuple(shard.held.size for shard in self.shards)

    @property
    def out_features(self) -> int:
        """Output features on this rank."""
        return sum(self.shard_sizes)

    @property
    def parts(self) -> dict[str, MatrixPart]:
        """Where each shard belongs, by the shard's name."""
        return {
            shard.name: MatrixPart(index, shard.held, self.inputs, self.shard_sizes[:index])
            for index, shard in enumerate(self.shards)
        }


class LinearMethod(ABC):
    """Creates, loads, finishes and applies the weights of any number of linear layers; has no state of its
    own."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Registers this rank's parameters on the layer, unfilled. Each is a LinearWeight, under the name
        that its tensor has in checkpoints."""

    def load_shard(self, parameter: LinearWeight, tensor: torch.Tensor, part: MatrixPart) -> None:
        """Copies this rank's part of a checkpoint tensor into a parameter. A format whose files differ from
        its parameters by more than the part converts here.

        Raises:
            ShardError: the tensor's shape is not what the parameter needs.
        """
        parameter.load(tensor, part)

    def finish_loading(self, layer: nn.Module) -> None:  # noqa: B027 - most methods have nothing to do
        """Called once when the parameters are filled."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in_features] -> [T, out_features]."""

    def look_up(self, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [T] -> [T, in_features], where the method is one that `for_table` gives."""
        raise NotImplementedError


class DenseMethod(LinearMethod):
    """Plain weights in the model's dtype."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        data = torch.empty(shape.out_features, shape.in_features)
        weight = LinearWeight.make(data, output=FeatureDim(0), input=FeatureDim(1))
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)  # type: ignore[arg-type]


# A layer's full name and a shard's, as for_matrix takes them -> the format that the checkpoint has the matrix
# in, such as "F32", "BF16" or "Q4_K"; "" where it does not say.
FormatOf = Callable[[str, str], str]


class LinearMethods(ABC):
    """Chooses the method of each linear layer of one model, by the layer's name."""

    @abstractmethod
    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        """The method of one checkpoint matrix. Matrices with the same method share one object.

        Args:
            layer: its layer's full name, such as "model.layers.3.self_attn.qkv_proj" or "lm_head".
            shard: which of a fused layer's matrices, such as "q"; "" where the layer is not fused. What
                checkpoints call it, CheckpointNames.module says.
            changes: whether its numbers are changed as they are loaded, so that they must be plain ones.
        """

    def for_table(self, name: str) -> LinearMethod | None:
        """The method of a token embedding, by its name; None for plain weights that LayerOps.embed looks
        up."""
        return None

    def for_checkpoint(self, format_of: FormatOf) -> LinearMethods:
        """These methods for a model of this checkpoint, before any layer of it is created."""
        return self


class SameMethod(LinearMethods):
    """One method for all layers."""

    def __init__(self, method: LinearMethod) -> None:
        self._method = method

    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        return self._method
