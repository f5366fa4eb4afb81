"""Linear layers split over tensor-parallel ranks, after Megatron-LM (arXiv:1909.08053).

Column-parallel layers hold a range of output features and need no communication; row-parallel layers
hold a range of input features and sum over ranks. A world of one rank is the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import cast

import torch
from torch import nn

from engine.layers.adapters import AdapterBatch, LinearAdapters
from engine.layers.linear_method import LinearMethod, LinearMethods, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight, OutputShard
from engine.layers.parallel import FeatureRange, SplitError, TensorParallel
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule

logger = logging.getLogger(__name__)


class LinearLayer(LoadableModule):
    """x [T, in on this rank] -> [T, out on this rank]: one or several checkpoint matrices, one product.

    Attributes:
        adapters: what multiplies where tokens have adapters; None where there are none.
    """

    adapters: LinearAdapters | None = None

    def __init__(
        self,
        name: str,
        shape: LinearShape,
        method: LinearMethod,
        *,
        bias: bool,
        shared_weight: nn.Parameter | None = None,
    ) -> None:
        """
        Args:
            name: the layer's full name in the model.
            shared_weight: another layer's, which loads it; this one then has no parameters of its own.

        Raises:
            SplitError: the method has no place for a shard or for this rank's part of one.
        """
        super().__init__()
        self.layer_name = name
        self.method = method
        self.parts = shape.parts
        self.out_features = shape.out_features
        self.checkpoint_shards = tuple(shard.name for shard in shape.shards if shard.name)
        self.bias: LinearWeight | None = None
        if shared_weight is not None:
            self.weight = shared_weight
            return
        method.create_weights(self, shape)
        if bias:
            self.bias = LinearWeight.make(torch.empty(shape.out_features), output=FeatureDim(0))
        for parameter_name, parameter in self.named_parameters(recurse=False):
            assert isinstance(parameter, LinearWeight), f"{name}.{parameter_name}"
            parameter.require_loadable(self.parts.values(), f"{name}.{parameter_name}")

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        parameter: LinearWeight = getattr(self, name)
        self.method.load_shard(parameter, tensor, self.parts[shard or ""])

    def finish_loading(self) -> None:
        self.method.finish_loading(self)

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        return self.product(x, self.bias, None if context is None else context.adapters)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, batch: AdapterBatch | None) -> torch.Tensor:
        """This rank's product, with what the adapters of its tokens add."""
        if batch is None or self.adapters is None:
            return self.method.apply(self, x, bias)
        return self.adapters.product(self.method, self, x, bias, batch)


class SeparateProducts(LinearMethod):
    """For a fused layer whose matrices have different methods: a product for each run of the same one.

    Formats mix inside fused layers more often than not: GGUF files keep value projections at more bits than
    queries and keys, and any matrix may be excluded from quantization.
    """

    def __init__(self, methods: Sequence[LinearMethod]) -> None:
        """Takes the method of each shard."""
        self._methods = methods

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        assert isinstance(layer, LinearLayer)
        layers = []
        for method, run in groupby(zip(self._methods, shape.shards, strict=True), lambda pair: pair[0]):
            part = LinearShape(tuple(shard for _, shard in run), shape.inputs)
            layers.append(LinearLayer(layer.layer_name, part, method, bias=False))
        layer.separate = nn.ModuleList(layers)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        separate = cast(Sequence[LinearLayer], layer.separate)
        sizes = [part.out_features for part in separate]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        products = [part.method.apply(part, x, own) for part, own in zip(separate, biases, strict=True)]
        return torch.cat(products, dim=-1)


class ColumnParallelLinear(LinearLayer):
    """x [T, in] -> [T, this rank's out]. Matrices whose methods differ are multiplied one by one.

    Where a number format has no place for a rank's part, every rank computes the whole and takes its own.

    Attributes:
        held: this rank's features of each matrix.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        shards: Sequence[OutputShard],
        *,
        bias: bool,
        methods: LinearMethods,
    ) -> None:
        chosen = [methods.for_matrix(name, shard.name) for shard in shards]
        same = all(method == chosen[0] for method in chosen)
        method = chosen[0] if same else SeparateProducts(chosen)
        inputs = FeatureRange.whole(in_features)
        self.held = {shard.name: shard.held for shard in shards}
        self._is_whole = False
        try:
            super().__init__(name, LinearShape(tuple(shards), inputs), method, bias=bias)
        except SplitError as error:
            whole = tuple(OutputShard(each.name, FeatureRange.whole(each.held.total)) for each in shards)
            if whole == tuple(shards):
                raise
            _note_fallback(name, "every rank has the whole of it", str(error))
            super().__init__(name, LinearShape(whole, inputs), method, bias=bias)
            self._is_whole = True

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        product: torch.Tensor = super().forward(x, context)
        if not self._is_whole:
            return product
        held = self.held.values()
        matrices = torch.split(product, [each.total for each in held], dim=-1)
        return torch.cat(
            [
                matrix[..., own.first : own.first + own.size]
                for matrix, own in zip(matrices, held, strict=True)
            ],
            dim=-1,
        )


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several matrices with the same input, such as gate and up, as one product.

    The output of each rank is its part of the first matrix, then of the second, and so on.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: Mapping[str, int],
        *,
        bias: bool,
        methods: LinearMethods,
        parallel: TensorParallel,
    ) -> None:
        shards = [OutputShard(shard, parallel.part(total, shard)) for shard, total in out_features.items()]
        super().__init__(name, in_features, shards, bias=bias, methods=methods)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one product, split by whole heads.

    Where there are more ranks than key-value heads, each of these heads is held by several ranks.

    Attributes:
        num_heads, num_kv_heads: on this rank.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        methods: LinearMethods,
        parallel: TensorParallel,
    ) -> None:
        share = parallel.share_heads(num_heads, num_kv_heads)
        q, kv = (_channels(heads, head_dim) for heads in (share.heads, share.kv_heads))
        shards = [OutputShard("q", q), OutputShard("k", kv), OutputShard("v", kv)]
        super().__init__(name, hidden_size, shards, bias=bias, methods=methods)
        self.num_heads, self.num_kv_heads = share.heads.size, share.kv_heads.size


class RowParallelLinear(LinearLayer):
    """x [T, this rank's in] -> [T, out], summed over ranks.

    Where a number format cannot be split by inputs (act-order, groups that a rank's part would cut), ranks
    have some of the outputs each: they exchange what they have of x, and then their products.

    Args:
        input_parts: what each rank has of the inputs, where it is not what `parallel` would give it.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        methods: LinearMethods,
        parallel: TensorParallel,
        input_parts: Sequence[FeatureRange] = (),
    ) -> None:
        method = methods.for_matrix(name, "")
        input_parts = input_parts or parallel.parts(in_features, "in_features")
        outputs, own = FeatureRange.whole(out_features), input_parts[parallel.rank]
        self._input_parts = tuple(input_parts)
        # What each rank has of the outputs, where inputs are not split; empty where they are.
        self._output_parts: tuple[FeatureRange, ...] = ()
        try:
            super().__init__(name, LinearShape((OutputShard("", outputs),), own), method, bias=bias)
        except SplitError as error:
            if parallel.size == 1:
                raise
            parts = parallel.parts(out_features, "out_features")
            inputs = FeatureRange.whole(own.total)
            try:
                shape = LinearShape((OutputShard("", parts[parallel.rank]),), inputs)
                super().__init__(name, shape, method, bias=bias)
                _note_fallback(name, "ranks have some of its outputs each", str(error))
            except SplitError:
                super().__init__(name, LinearShape((OutputShard("", outputs),), inputs), method, bias=bias)
                _note_fallback(name, "every rank has the whole of it", str(error))
                parts = [outputs]
            self._output_parts = tuple(parts)
        self.parallel = parallel

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        if self._output_parts:
            whole = self.parallel.all_gather_last_dim(x, self._input_parts)
            product: torch.Tensor = super().forward(whole, context)
            if len(self._output_parts) == 1:
                return product
            return self.parallel.all_gather_last_dim(product, self._output_parts)
        # The bias is added by one rank only, since the results are summed.
        bias = self.bias if self.parallel.rank == 0 else None
        partial = self.product(x, bias, None if context is None else context.adapters)
        return self.parallel.all_reduce(partial)


def _channels(heads: FeatureRange, head_dim: int) -> FeatureRange:
    """The channels of some heads."""
    return FeatureRange(heads.first * head_dim, heads.size * head_dim, heads.total * head_dim)


def head_channels(
    parallel: TensorParallel, num_heads: int, num_kv_heads: int, head_dim: int
) -> list[FeatureRange]:
    """The channels of each rank's heads, which an output projection has as inputs."""
    ranks = map(parallel.of_rank, range(parallel.size))
    return [_channels(rank.share_heads(num_heads, num_kv_heads).heads, head_dim) for rank in ranks]


def _note_fallback(name: str, what: str, reason: str) -> None:
    """Says in the log how a layer is computed that ranks cannot share as others, once for all such layers."""
    _note_once(".".join(name.split(".")[-2:]), what, reason)


@lru_cache(maxsize=64)
def _note_once(name: str, what: str, reason: str) -> None:
    logger.warning("%s: %s, which costs time or memory: %s", name, what, reason)
