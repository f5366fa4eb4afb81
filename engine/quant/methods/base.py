"""Linear layers whose weights become layouts when they are loaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
from torch import nn

from engine.layers.linear_method import LinearMethod, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight, MatrixPart
from engine.layers.parallel import SplitError
from engine.layers.weights import ShardError
from engine.quant.layouts.base import Layout, join_runs
from engine.quant.products import LayoutProducts
from engine.quant.schemes import Scheme


@dataclass(frozen=True, slots=True)
class StoredShape:
    """A tensor of a checkpoint, of which nothing but the header was read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors(Protocol):
    """What tensors a checkpoint has; with random weights there is none."""

    def find(self, layer: str, shard: str, tensor: str) -> StoredShape | None:
        """A tensor of one matrix, such as "g_idx"; None if the checkpoint does not have it.

        Args:
            layer, shard: as LinearMethods.for_matrix has them.
        """
        ...


class NothingStored:
    """Random weights: formats then have the tensors that they cannot do without."""

    def find(self, layer: str, shard: str, tensor: str) -> StoredShape | None:
        return None


@dataclass(frozen=True, slots=True)
class Matrix:
    """One checkpoint matrix of a layer, loaded: this rank's part.

    Attributes:
        where: its layer, for errors.
        out_features, in_features: of this rank.
        tensors: by the names that files have for them; those that are missing are not here.
    """

    where: str
    out_features: int
    in_features: int
    tensors: dict[str, torch.Tensor]


OneScheme = TypeVar("OneScheme", bound=Scheme)


class QuantizedMethod(LinearMethod, Generic[OneScheme]):
    """A format of files. Its parameters are the tensors of the files until all of a layer's are there; then
    they become layouts, as few as there can be, in the layer's attribute `layouts`.

    Args:
        scheme: of all its matrices.
        products: the device's.
        stored: what the checkpoint has.
    """

    def __init__(self, scheme: OneScheme, products: LayoutProducts, stored: StoredTensors) -> None:
        self.scheme, self._products, self._stored = scheme, products, stored

    @abstractmethod
    def convert(self, matrix: Matrix) -> Layout:
        """One checkpoint matrix as a layout."""

    def finish_loading(self, layer: nn.Module) -> None:
        names = [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]
        parts = cast(dict[str, MatrixPart], layer.parts)
        where = cast(str, layer.layer_name)
        layouts = [self.convert(_matrix(layer, names, part, where)) for part in parts.values()]
        for name in names:
            layer.register_parameter(name, None)
        self.keep(layer, layouts)

    def keep(self, layer: nn.Module, layouts: Sequence[Layout]) -> None:
        """Gives a layer its matrices, in order, as the device multiplies by them."""
        joined = join_runs(layouts)
        layer.layouts = tuple(self._products.prepared(layout) for layout in joined)  # type: ignore[assignment]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layouts = cast(Sequence[Layout], layer.layouts)
        if len(layouts) == 1:
            return self._products.multiply(layouts[0], x, bias)
        sizes = [layout.out_features for layout in layouts]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        products = [
            self._products.multiply(layout, x, own) for layout, own in zip(layouts, biases, strict=True)
        ]
        return torch.cat(products, dim=-1)

    def is_stored(self, layer: nn.Module, shape: LinearShape, tensor: str) -> bool:
        """Whether the checkpoint has a tensor of each of a layer's matrices."""
        return all(
            self._stored.find(cast(str, layer.layer_name), shard.name, tensor) is not None
            for shard in shape.shards
        )

    def stored_dtype(self, layer: nn.Module, shape: LinearShape, tensor: str) -> torch.dtype | None:
        """The dtype that a checkpoint has a tensor in, of the layer's first matrix; None if it has none."""
        found = self._stored.find(cast(str, layer.layer_name), shape.shards[0].name, tensor)
        return None if found is None else found.dtype

    def shape_of(self, layer: nn.Module, shape: LinearShape, tensor: str) -> tuple[int, ...] | None:
        """The shape that a checkpoint has a tensor in, of the layer's first matrix; None if it has none."""
        found = self._stored.find(cast(str, layer.layer_name), shape.shards[0].name, tensor)
        return None if found is None else found.shape

    def first_stored(self, layer: nn.Module, shape: LinearShape, *names: str) -> str:
        """Which of these names a checkpoint has for a tensor; the first where it has none."""
        return next((name for name in names if self.is_stored(layer, shape, name)), names[0])


def _matrix(layer: nn.Module, names: Sequence[str], part: MatrixPart, where: str) -> Matrix:
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        weight = cast(LinearWeight, layer.get_parameter(name))
        tensor = _of_part(weight, part)
        if tensor is not None:
            tensors[weight.file_name or name] = tensor
    return Matrix(where, part.outputs.size, part.inputs.size, tensors)


def _of_part(parameter: LinearWeight, part: MatrixPart) -> torch.Tensor | None:
    """What a parameter holds of one checkpoint matrix."""
    if isinstance(parameter, KeptTensors):
        return parameter.kept.get(part.index)
    if parameter.per_shard:
        return parameter.data[part.index]
    if parameter.output is None:
        return parameter.data
    first = sum(parameter.output.count(size) for size in part.sizes_before)
    return parameter.data.narrow(parameter.output.dim, first, parameter.output.count(part.outputs.size))


class KeptTensors(LinearWeight):
    """A parameter whose tensors are of any size, one for each matrix of the layer, kept as they come. Ranks
    cannot split it.

    Attributes:
        kept: by the place of the matrix among the layer's.
    """

    kept: dict[int, Any]
    device_of_layer: torch.device

    @classmethod
    def of(cls, dtype: torch.dtype, *sizes: int, file_name: str = "") -> Self:
        """One for tensors of this dtype; the sizes are of all of them, for what counts parameters."""
        weight = cls(torch.empty(sizes or 0, dtype=dtype, device="meta"), requires_grad=False)
        weight.output = weight.input = None
        weight.per_shard = weight.is_scale = False
        weight.file_name = file_name
        weight.kept, weight.device_of_layer = {}, torch.get_default_device()
        return weight

    def require_loadable(self, parts: Any, where: str) -> None:
        for part in parts:
            if (part.outputs.size, part.inputs.size) != (part.outputs.total, part.inputs.total):
                raise SplitError(f"{where} cannot be split over tensor-parallel ranks; use one")

    def load(self, tensor: torch.Tensor, part: MatrixPart) -> None:
        if not tensor.is_meta:
            self.kept[part.index] = tensor.to(self.device_of_layer, copy=True)


def parameter(
    layer: nn.Module,
    name: str,
    sizes: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    output: FeatureDim | None = None,
    input: FeatureDim | None = None,
    per_shard: bool = False,
    is_scale: bool = False,
) -> None:
    """Registers an unfilled parameter for a tensor that files call so, such as "weight.absmax"."""
    data = torch.empty(tuple(sizes), dtype=dtype or torch.get_default_dtype())
    weight = LinearWeight.make(data, output=output, input=input, per_shard=per_shard, is_scale=is_scale)
    register(layer, name, weight)


def register(layer: nn.Module, name: str, weight: LinearWeight) -> None:
    """Registers a parameter under the name that files have for its tensor, which may have dots."""
    weight.file_name = name
    layer.register_parameter(name.replace(".", "__"), weight)


def count_outputs(shape: LinearShape, dim: FeatureDim) -> int:
    """Elements along a dimension of outputs: each matrix begins anew."""
    return sum(dim.count(size) for size in shape.shard_sizes)


def require_multiple(layer: nn.Module, what: str, size: int, unit: int) -> None:
    """Raises SplitError unless the size is a multiple of the unit."""
    if size % unit:
        raise SplitError(f"{layer.layer_name}: {what} is {size}; it must be a multiple of {unit}")


def require_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor. Raises ShardError if its shape is another."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShardError(f"has shape {list(tensor.shape)}; {list(shape)} is needed")
    return tensor
