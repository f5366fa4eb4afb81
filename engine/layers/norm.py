"""Normalisation of activations, with the residual addition beside it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from engine.layers.norm_config import NormConfig
from engine.layers.ops import LayerOps
from engine.layers.parallel import FeatureRange, TensorParallel
from engine.layers.weights import LoadableModule, copy_checked, take_part


class Norm(LoadableModule):
    """Normalises over the last dimension."""

    eps: float
    weight: nn.Parameter

    @abstractmethod
    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> the same shape, in x's dtype."""

    @abstractmethod
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream to x, then normalises.

        Returns:
            (normalised sum, the sum itself, which is the new residual stream), both [T, hidden]. The given
            residual is overwritten; where there is none, x becomes it.
        """


class RMSNorm(Norm):
    """x / rms(x) * weight (arXiv:1910.07467).

    Args:
        one_plus: whether checkpoints hold the weight less one. The sum is kept in fp32: near one, bfloat16
            has steps of 1/128.
    """

    def __init__(self, size: int, eps: float, ops: LayerOps, *, one_plus: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self._one_plus = one_plus
        dtype = torch.float32 if one_plus else None
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        copy_checked(self.weight, tensor.float() + 1.0 if self._one_plus else tensor)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps), residual


class SplitRMSNorm(RMSNorm):
    """The RMS norm of channels that ranks hold parts of: they add up their squares.

    Args:
        held: this rank's channels.
        replicas: how many ranks hold the same.
    """

    def __init__(
        self, held: FeatureRange, eps: float, ops: LayerOps, parallel: TensorParallel, replicas: int
    ) -> None:
        super().__init__(held.size, eps, ops)
        self._held, self._parallel, self._replicas = held, parallel, replicas

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        held = self._held
        copy_checked(self.weight, take_part(tensor, 0, held.first, held.size, held.total))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        numbers = x.float()
        squares = self._parallel.all_reduce(numbers.square().sum(-1, keepdim=True))
        mean = squares / (self._held.total * self._replicas)
        return (numbers * (mean + self.eps).rsqrt()).to(x.dtype) * self.weight


class LayerNorm(Norm):
    """(x - mean(x)) / std(x) * weight + bias (arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, ops: LayerOps, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return self.ops.layer_norm(x, self.weight, self.bias, self.eps), x
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps), residual


class LayerNormOfHeads(LoadableModule):
    """The layer norm of each head for itself, with weights of its own and no bias.

    Args:
        name: the full name in the model, such as "model.layers.3.self_attn.q_norm".
        heads: those that this rank holds.
        is_split: whether checkpoints have a tensor for each head, and not one for all, [heads, head_dim].
    """

    _ones: torch.Tensor

    def __init__(
        self, name: str, heads: FeatureRange, head_dim: int, eps: float, ops: LayerOps, *, is_split: bool
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.eps, self.ops, self._heads = eps, ops, heads
        if is_split:
            self.checkpoint_shards = tuple(map(str, range(heads.total)))
        self.weight = nn.Parameter(torch.empty(heads.size, head_dim), requires_grad=False)
        self.register_buffer("_ones", torch.ones(head_dim), persistent=False)

    def load_parameter(self, name: str, tensor: torch.Tensor, shard: str | None) -> None:
        heads = self._heads
        if shard is None:
            copy_checked(self.weight, take_part(tensor, 0, heads.first, heads.size, heads.total))
            return
        held = int(shard) - heads.first
        is_held = 0 <= held < heads.size
        # Of another rank's head the shape is checked.
        copy_checked(self.weight[held if is_held else 0], tensor if is_held else tensor.to("meta"))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads * head_dim] -> the same shape, in x's dtype."""
        rows = x.reshape(-1, self.weight.shape[1])
        normed = self.ops.layer_norm(rows, self._ones, None, self.eps).view(len(x), *self.weight.shape)
        return (normed * self.weight).view(x.shape)


def make_norm(size: int, config: NormConfig, ops: LayerOps) -> Norm:
    """The norm that a configuration names, over `size` channels."""
    if config.kind == "layer":
        return LayerNorm(size, config.eps, ops, bias=config.bias)
    return RMSNorm(size, config.eps, ops, one_plus=config.one_plus)
