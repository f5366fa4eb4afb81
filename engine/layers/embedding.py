"""Token embedding and output projection, split over ranks by ranges of the vocabulary."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear_method import LinearMethod
from engine.layers.ops import LayerOps
from engine.layers.parallel import TensorParallel
from engine.layers.weights import LoadableModule, copy_checked, take_part, vocab_range


class VocabParallelEmbedding(LoadableModule):
    """token_ids [T] -> [T, hidden]. Each rank looks up its own range; the sum over ranks is complete."""

    def __init__(self, vocab_size: int, hidden_size: int, *, ops: LayerOps, parallel: TensorParallel) -> None:
        super().__init__()
        self.ops = ops
        self.vocab_size = vocab_size
        self.parallel = parallel
        self.start, self.end = vocab_range(vocab_size, parallel)
        self.weight = nn.Parameter(torch.empty(self.end - self.start, hidden_size), requires_grad=False)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        part = take_part(tensor, 0, self.parallel.rank, self.end - self.start, self.vocab_size)
        copy_checked(self.weight, part)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.parallel.size == 1:
            return self.ops.embed(token_ids, self.weight)
        elsewhere = (token_ids < self.start) | (token_ids >= self.end)
        local = (token_ids - self.start).masked_fill(elsewhere, 0)
        hidden = self.ops.embed(local, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.parallel.all_reduce(hidden)


class ParallelLMHead(LoadableModule):
    """hidden [S, hidden] -> logits [S, vocab] in the model's dtype, complete on every rank.

    Where the model ties its embeddings, the weight is the embedding's and nothing is loaded here.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        method: LinearMethod,
        parallel: TensorParallel,
        tied_to: VocabParallelEmbedding | None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.method = method
        self.parallel = parallel
        start, end = vocab_range(vocab_size, parallel)
        self.part = end - start
        if tied_to is None:
            method.create_weights(self, hidden_size, self.part)
        else:
            self.weight = tied_to.weight

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        if getattr(getattr(self, name), "output_dim", 0) is not None:
            tensor = take_part(tensor, 0, self.parallel.rank, self.part, self.vocab_size)
        copy_checked(getattr(self, name), tensor)

    def finish_loading(self) -> None:
        self.method.finish_loading(self)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.parallel.all_gather_last_dim(self.method.apply(self, hidden, None))
