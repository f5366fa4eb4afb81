"""Linear layers split over tensor-parallel ranks, after Megatron-LM (arXiv:1909.08053).

Column-parallel layers hold a range of output features and need no communication; row-parallel layers
hold a range of input features and sum over ranks. A world of one rank is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.layers.linear_method import LinearMethod, LinearWeight
from engine.layers.parallel import TensorParallel
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule, copy_checked, take_part


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One checkpoint matrix inside a fused column-parallel layer.

    Attributes:
        name: of the shard; "" where the layer is not fused.
        total: output features in the checkpoint.
        size: output features on this rank.
        offset: where they begin in this rank's parameter.
        index: which of the equal parts of the checkpoint matrix this rank holds.
    """

    name: str
    total: int
    size: int
    offset: int
    index: int


class ColumnParallelLinear(LoadableModule):
    """x [T, in] -> [T, this rank's out]. One or several checkpoint matrices, one product."""

    def __init__(
        self,
        in_features: int,
        shards: Sequence[OutputShard],
        *,
        bias: bool,
        method: LinearMethod,
    ) -> None:
        super().__init__()
        self.method = method
        self.shards = {shard.name: shard for shard in shards}
        self.checkpoint_shards = tuple(name for name in self.shards if name)
        out_features = sum(shard.size for shard in shards)
        method.create_weights(self, in_features, out_features)
        self.bias: LinearWeight | None = None
        if bias:
            self.bias = LinearWeight.make(torch.empty(out_features), output_dim=0, input_dim=None)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        parameter: LinearWeight = getattr(self, name)
        part = self.shards[shard or ""]
        dim = parameter.output_dim
        if dim is None:
            copy_checked(parameter, tensor)
            return
        source = take_part(tensor, dim, part.index, part.size, part.total)
        copy_checked(parameter.narrow(dim, part.offset, part.size), source)

    def finish_loading(self) -> None:
        self.method.finish_loading(self)

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        return self.method.apply(self, x, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several matrices with the same input, such as gate and up, as one product.

    The output of each rank is its part of the first matrix, then of the second, and so on.
    """

    def __init__(
        self,
        in_features: int,
        out_features: dict[str, int],
        *,
        bias: bool,
        method: LinearMethod,
        parallel: TensorParallel,
    ) -> None:
        shards, offset = [], 0
        for name, total in out_features.items():
            size = parallel.split(total, name)
            shards.append(OutputShard(name, total, size, offset, parallel.rank))
            offset += size
        super().__init__(in_features, shards, bias=bias, method=method)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one product, split by whole heads.

    Where there are more ranks than key-value heads, each of these heads is held by several ranks.

    Attributes:
        num_heads, num_kv_heads: on this rank.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        method: LinearMethod,
        parallel: TensorParallel,
    ) -> None:
        self_heads = parallel.split(num_heads, "num_attention_heads")
        replicas = max(1, parallel.size // num_kv_heads)
        kv_ranks = TensorParallel(parallel.rank // replicas, parallel.size // replicas)
        kv_heads = kv_ranks.split(num_kv_heads, "num_key_value_heads")
        q_size, kv_size = self_heads * head_dim, kv_heads * head_dim
        kv_total = num_kv_heads * head_dim
        shards = [
            OutputShard("q", num_heads * head_dim, q_size, 0, parallel.rank),
            OutputShard("k", kv_total, kv_size, q_size, kv_ranks.rank),
            OutputShard("v", kv_total, kv_size, q_size + kv_size, kv_ranks.rank),
        ]
        super().__init__(hidden_size, shards, bias=bias, method=method)
        self.num_heads, self.num_kv_heads = self_heads, kv_heads


class RowParallelLinear(LoadableModule):
    """x [T, this rank's in] -> [T, out], summed over ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        method: LinearMethod,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        self.method = method
        self.parallel = parallel
        self.in_features = in_features
        self.part = parallel.split(in_features, "in_features")
        method.create_weights(self, self.part, out_features)
        self.bias: LinearWeight | None = None
        if bias:
            self.bias = LinearWeight.make(torch.empty(out_features), output_dim=0, input_dim=None)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        parameter: LinearWeight = getattr(self, name)
        if parameter.input_dim is not None:
            tensor = take_part(tensor, parameter.input_dim, self.parallel.rank, self.part, self.in_features)
        copy_checked(parameter, tensor)

    def finish_loading(self) -> None:
        self.method.finish_loading(self)

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        # The bias is added by one rank only, since the results are summed.
        bias = self.bias if self.parallel.rank == 0 else None
        return self.parallel.all_reduce(self.method.apply(self, x, bias))
