"""Linear layers split over tensor-parallel ranks, after Megatron-LM (arXiv:1909.08053).

Column-parallel layers hold a range of output features and need no communication; row-parallel layers
hold a range of input features and sum over ranks. A world of one rank is the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import nn

from engine.layers.linear_method import LinearMethod, LinearMethods, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight, OutputShard
from engine.layers.parallel import FeatureRange, TensorParallel
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule


class LinearLayer(LoadableModule):
    """x [T, in on this rank] -> [T, out on this rank]: one or several checkpoint matrices, one product."""

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
        return self.method.apply(self, x, self.bias)


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
    """x [T, in] -> [T, this rank's out]. Matrices whose methods differ are multiplied one by one."""

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
        super().__init__(name, LinearShape(tuple(shards), FeatureRange.whole(in_features)), method, bias=bias)


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
        heads = parallel.split(num_heads, "num_attention_heads")
        replicas = max(1, parallel.size // num_kv_heads)
        kv_ranks = TensorParallel(parallel.rank // replicas, parallel.size // replicas)
        kv_heads = kv_ranks.split(num_kv_heads, "num_key_value_heads")
        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        q = FeatureRange(parallel.rank * q_size, q_size, num_heads * head_dim)
        kv = FeatureRange(kv_ranks.rank * kv_size, kv_size, num_kv_heads * head_dim)
        shards = [OutputShard("q", q), OutputShard("k", kv), OutputShard("v", kv)]
        super().__init__(name, hidden_size, shards, bias=bias, methods=methods)
        self.num_heads, self.num_kv_heads = heads, kv_heads


class RowParallelLinear(LinearLayer):
    """x [T, this rank's in] -> [T, out], summed over ranks."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        methods: LinearMethods,
        parallel: TensorParallel,
    ) -> None:
        shards = (OutputShard("", FeatureRange.whole(out_features)),)
        shape = LinearShape(shards, parallel.part(in_features, "in_features"))
        super().__init__(name, shape, methods.for_matrix(name, ""), bias=bias)
        self.parallel = parallel

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        # The bias is added by one rank only, since the results are summed.
        bias = self.bias if self.parallel.rank == 0 else None
        return self.parallel.all_reduce(self.method.apply(self, x, bias))
