"""Token embedding and output projection, split over ranks by ranges of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearMethods, LinearShape
from engine.layers.linear_weight import OutputShard
from engine.layers.ops import LayerOps
from engine.layers.parallel import FeatureRange, TensorParallel
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule, copy_checked, take_part


class VocabParallelEmbedding(LoadableModule):
    """token_ids [T] -> [T, hidden]. Each rank looks up its own range; the sum over ranks is complete."""

    def __init__(self, vocab_size: int, hidden_size: int, *, ops: LayerOps, parallel: TensorParallel) -> None:
        super().__init__()
        self.ops = ops
        self.parallel = parallel
        self.held = parallel.part(vocab_size, "vocab_size")
        self.weight = nn.Parameter(torch.empty(self.held.size, hidden_size), requires_grad=False)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        held = self.held
        copy_checked(self.weight, take_part(tensor, 0, held.first, held.size, held.total))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.parallel.size == 1:
            return self.ops.embed(token_ids, self.weight)
        local = token_ids - self.held.first
        elsewhere = (local < 0) | (local >= self.held.size)
        local = local.masked_fill(elsewhere, 0)
        hidden = self.ops.embed(local, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.parallel.all_reduce(hidden)


class ParallelLMHead(LinearLayer):
    """hidden [S, hidden] -> logits [S, vocab] in the model's dtype, complete on every rank.

    Where the model ties its embeddings, the weight is the embedding's and nothing is loaded here; the layer's
    method must then be one for plain weights.

    Args:
        normalised: whether the weight's rows are scaled to length 1 as they are loaded.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        *,
        methods: LinearMethods,
        parallel: TensorParallel,
        tied_to: VocabParallelEmbedding | None,
        normalised: bool = False,
    ) -> None:
        shards = (OutputShard("", parallel.part(vocab_size, "vocab_size")),)
        shape = LinearShape(shards, FeatureRange.whole(hidden_size))
        shared = None if tied_to is None else tied_to.weight
        super().__init__(name, shape, methods.for_matrix(name, ""), bias=False, shared_weight=shared)
        self.parallel = parallel
        self._normalised = normalised

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        if self._normalised and name == "weight":
            tensor = F.normalize(tensor.float())
        super().load_parameter(name, tensor, shard)

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        return self.parallel.all_gather_last_dim(self.method.apply(self, x, None))
