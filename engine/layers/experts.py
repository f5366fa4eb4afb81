"""The experts of a layer: many small feed-forward networks, of which each token uses a few.

Ranks split every expert along its intermediate channels, as they split any feed-forward layer: so each rank
routes all tokens alike, and their parts add up.

An ExpertMethod is to the experts of a layer what a LinearMethod is to a linear layer: it knows the number
format and multiplies, and the layer knows which part of the matrices its rank holds. A quantized format is
another ExpertMethod, and models do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from engine.layers.expert_config import ExpertTensors, GatedActivation
from engine.layers.linear_method import FormatOf, LinearMethods, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight, OutputShard
from engine.layers.ops import LayerOps, Routing
from engine.layers.parallel import FeatureRange, TensorParallel
from engine.layers.weights import LoadableModule, ShardError


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What this rank holds of a matrix that each of a layer's experts has one of.

    Attributes:
        num_experts: of the layer; a rank holds a part of each.
        matrix: that part of one expert's.
    """

    num_experts: int
    matrix: LinearShape


class ExpertMethod(ABC):
    """Creates, loads, finishes and applies the weights of any number of layers of experts; has no state of
    its own."""

    def for_checkpoint(self, format_of: FormatOf) -> ExpertMethod:
        """This method for a model of this checkpoint, before any layer of it is created."""
        return self

    def for_matrices(self, methods: LinearMethods) -> ExpertMethod:
        """This method for experts each of whose matrices is loaded by a method of its own, where it can be
        one for those."""
        raise NotImplementedError

    @abstractmethod
    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        """Registers this rank's parameters, unfilled. Each is a LinearWeight whose first dimension counts the
        experts, so that its dimensions of features are those of one expert's tensor and one more."""

    def unstack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A checkpoint tensor of all experts in the parameter's number of dimensions."""
        return tensor

    def finish_loading(self, weights: ExpertWeights) -> None:  # noqa: B027 - most have nothing to do
        """Called once when the parameters are filled."""

    @abstractmethod
    def apply(self, experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [T, hidden] -> the weighted sum of what each token's experts make of it, [T, hidden]; of several
        ranks, this one's part of the sum."""


class ExpertWeights(LoadableModule):
    """A matrix of each expert, [E, N on this rank, K on this rank], and its bias [E, N].

    Args:
        name: the full name in the model, such as "model.layers.3.mlp.experts.gate_up_proj".
        tensors: how checkpoints keep them.

    Raises:
        SplitError: the method has no place for this rank's part.
    """

    def __init__(
        self,
        name: str,
        shape: ExpertShape,
        method: ExpertMethod,
        *,
        bias: bool,
        tensors: ExpertTensors,
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.num_experts = shape.num_experts
        self.method, self._tensors, self._parts = method, tensors, shape.matrix.parts
        if not tensors.stacked:
            experts = range(shape.num_experts)
            self.checkpoint_shards = tuple(f"{expert}.{part}" for expert in experts for part in self._parts)
        method.create_weights(self, shape)
        self.bias: LinearWeight | None = None
        if bias:
            data = torch.empty(shape.num_experts, shape.matrix.out_features)
            self.bias = LinearWeight.make(data, output=FeatureDim(1))
        for parameter_name, parameter in self.named_parameters(recurse=False):
            assert isinstance(parameter, LinearWeight), f"{name}.{parameter_name}"
            parameter.require_loadable(self._parts.values(), f"{name}.{parameter_name}")

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        parameter: LinearWeight = getattr(self, name)
        if shard:
            expert, _, part = shard.partition(".")
            _of_expert(parameter, int(expert)).load(tensor, self._parts[part])
            return
        tensor = self.method.unstack(name, tensor)
        if tensor.dim() != parameter.dim():
            raise ShardError(f"has shape {list(tensor.shape)}; {parameter.dim()} dimensions are needed")
        if self._tensors.transposed and name == "weight":
            tensor = tensor.transpose(1, 2)
        count = len(self._parts)
        if tensor.shape[1] % count:
            raise ShardError(f"has shape {list(tensor.shape)}; it holds {count} matrices of the same size")
        interleaved = self._tensors.interleaved
        for index, matrix in enumerate(self._parts.values()):
            rows = tensor[:, index::count] if interleaved else tensor.chunk(count, 1)[index]
            parameter.load(rows, matrix)

    def finish_loading(self) -> None:
        self.method.finish_loading(self)


def _of_expert(parameter: LinearWeight, expert: int) -> LinearWeight:
    """One expert's entry in a parameter."""
    dims = [
        None if dim is None else FeatureDim(dim.dim - 1, dim.features, dim.elements)
        for dim in (parameter.output, parameter.input)
    ]
    return LinearWeight.make(parameter.data[expert], output=dims[0], input=dims[1])


class Experts(nn.Module):
    """down(activation(gate(x), up(x))) of each token's experts, weighted and added up.

    Args:
        name: the full name in the model, such as "model.layers.3.mlp.experts".
    """

    def __init__(
        self,
        name: str,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GatedActivation,
        bias: bool,
        tensors: ExpertTensors,
        method: ExpertMethod,
        ops: LayerOps,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        self.num_experts, self.activation = num_experts, activation
        self.ops, self.method, self.parallel = ops, method, parallel
        hidden = FeatureRange.whole(hidden_size)
        held = parallel.part(intermediate_size, "the intermediate size of experts")
        gate_up = LinearShape((OutputShard("gate", held), OutputShard("up", held)), hidden)
        down = LinearShape((OutputShard("down", hidden),), held)
        self.gate_up_proj, self.down_proj = (
            ExpertWeights(
                f"{name}.{own_name}", ExpertShape(num_experts, shape), method, bias=bias, tensors=tensors
            )
            for own_name, shape in (("gate_up_proj", gate_up), ("down_proj", down))
        )

    @property
    def down_bias(self) -> torch.Tensor | None:
        """What this rank adds after the second product: one rank does, since the results are summed."""
        return self.down_proj.bias if self.parallel.rank == 0 else None

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden], summed over ranks."""
        return self.parallel.all_reduce(self.method.apply(self, x, routing))
