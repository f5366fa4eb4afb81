"""Where adapters (LoRA, arXiv:2106.09685) meet the layers: what a layer asks for, and what a device computes.

An adapter that is in use has a slot, a number that is the same in every layer. A token's slot says which
adapter's matrices its products get beside the layer's own; tokens of many adapters and of none share a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engine.layers.linear_method import LinearMethod


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """Which adapter each of T tokens has; at least one has any. Devices have more of their own.

    Attributes:
        groups: the adapters' slots and the tokens of each, [n] int64 on the device. Tokens without an adapter
            are in none.
    """

    groups: Sequence[tuple[int, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class SlotTable:
    """What all layers share of the slots, on the device.

    Attributes:
        ranks: the largest rank of the slot's adapter, rounded up; rows of `a` and columns of `b` behind it
            mean nothing; [slots] int32.
        has_vectors: whether the slot's adapter has gains or offsets, [slots] int32.
    """

    ranks: torch.Tensor
    has_vectors: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """The memory of one linear layer for adapters. Where the layer is fused of P matrices, each has an `a` of
    its own, and the rows of `b` that are its outputs.

    A token in slot s gets y * gain[s] + offset[s] + b[s] a[s] x of the layer's y; the scale is in `b`.

    Attributes:
        a: [slots, P, R, in features on this rank], in the model's dtype.
        b: [slots, out features on this rank, R], in the model's dtype.
        gain, offset: [slots, out features on this rank] fp32; read where `has_vectors` says so.
        sizes: output features of each matrix on this rank, [P].
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor
    offset: torch.Tensor
    sizes: tuple[int, ...]
    table: SlotTable

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(each.nbytes for each in (self.a, self.b, self.gain, self.offset))


class LinearAdapters(ABC):
    """Multiplies by a linear layer's matrix and by those that adapters add to it."""

    @abstractmethod
    def product(
        self,
        method: LinearMethod,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        batch: AdapterBatch,
    ) -> torch.Tensor:
        """x [T, in] -> [T, out], before any sum over ranks.

        Args:
            method, layer: what multiplies by the layer's own matrix, and the module with its weights.
            bias: what the layer adds on this rank.
        """


class EmbeddingAdapters(ABC):
    """Changes what a token embedding gives for tokens with adapters."""

    @abstractmethod
    def changed(self, token_ids: torch.Tensor, hidden: torch.Tensor, batch: AdapterBatch) -> torch.Tensor:
        """token_ids [T], and what the base's table has for them [T, hidden] -> [T, hidden]."""
