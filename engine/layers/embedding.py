"""Token embedding and output projection, split over ranks by ranges of the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from engine.layers.adapters import AdapterBatch, EmbeddingAdapters
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearMethod, LinearMethods, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight, MatrixPart, OutputShard
from engine.layers.ops import LayerOps
from engine.layers.parallel import FeatureRange, TensorParallel
from engine.layers.step_context import StepContext
from engine.layers.weights import LoadableModule


class VocabParallelEmbedding(LoadableModule):
    """token_ids [T] -> [T, hidden]. Each rank looks up its own range; the sum over ranks is complete.

    Attributes:
        table: how its rows are stored; None for plain weights.
        adapters: what changes the rows of tokens with adapters; None where there are none.
    """

    adapters: EmbeddingAdapters | None = None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        ops: LayerOps,
        parallel: TensorParallel,
        table: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.parallel = parallel
        self.held = replace(parallel, block=1).part(vocab_size, "vocab_size")
        self.table = table
        self.part = MatrixPart(0, self.held, FeatureRange.whole(hidden_size), ())
        if table is None:
            data = torch.empty(self.held.size, hidden_size)
            self.weight = LinearWeight.make(data, output=FeatureDim(0))
        else:
            table.create_weights(self, LinearShape((OutputShard("", self.held),), self.part.inputs))

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        parameter: LinearWeight = getattr(self, name)
        parameter.load(tensor, self.part)

    def finish_loading(self) -> None:
        if self.table is not None:
            self.table.finish_loading(self)

    def forward(self, token_ids: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        hidden = self._look_up(token_ids)
        if context is None or context.adapters is None or self.adapters is None:
            return hidden
        return self.adapters.changed(token_ids, hidden, context.adapters)

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.parallel.size == 1:
            return self._rows(token_ids)
        local = token_ids - self.held.first
        elsewhere = (local < 0) | (local >= self.held.size)
        local = local.masked_fill(elsewhere, 0)
        hidden = self._rows(local).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.parallel.all_reduce(hidden)

    def _rows(self, local: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            return self.ops.embed(local, self.weight)
        return self.table.look_up(self, local)


class ParallelLMHead(LinearLayer):
    """hidden [S, hidden] -> logits [S, vocab] in the model's dtype, complete on every rank.

    Where the model ties its embeddings, the weight is the embedding's and nothing is loaded here. It is
    multiplied by as the embedding's own method does where it has one; otherwise the layer's method must be
    one for plain weights.

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
        # Equal parts where there can be: formats keep no rows together.
        parts = replace(parallel, block=1).parts(vocab_size, "vocab_size")
        shape = LinearShape((OutputShard("", parts[parallel.rank]),), FeatureRange.whole(hidden_size))
        shared = None if tied_to is None else tied_to.weight
        table = None if tied_to is None else tied_to.table
        method = table or methods.for_matrix(name, "", changes=normalised)
        super().__init__(name, shape, method, bias=False, shared_weight=shared)
        self.parallel, self._vocab_parts = parallel, parts
        # In a tuple, so that it is not a module of this one too.
        self._table = () if tied_to is None or table is None else (tied_to,)
        self._normalised = normalised

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        if self._normalised and name == "weight":
            tensor = F.normalize(tensor.float())
        super().load_parameter(name, tensor, shard)

    def finish_loading(self) -> None:
        if self._table:
            self.register_parameter("weight", None)  # the embedding finishes it
        else:
            super().finish_loading()

    def forward(self, x: torch.Tensor, context: StepContext | None = None) -> torch.Tensor:
        return self.logits(x, None if context is None else context.adapters)

    def logits(self, hidden: torch.Tensor, batch: AdapterBatch | None) -> torch.Tensor:
        """hidden [S, hidden] -> [S, vocab]; `batch` says which adapters these S have, not a step's tokens."""
        part = self.product(hidden, None, batch)
        return self.parallel.all_gather_last_dim(part, self._vocab_parts)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, batch: AdapterBatch | None) -> torch.Tensor:
        layer: LoadableModule = self._table[0] if self._table else self
        if batch is None or self.adapters is None:
            return self.method.apply(layer, x, bias)
        return self.adapters.product(self.method, layer, x, bias, batch)
