"""Adapters in the linear layers of a CPU, by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.attention.interface import IntArray
from engine.cpu.kernels.library import NativeLibrary
from engine.layers.adapters import AdapterBatch, LayerSlots, LinearAdapters
from engine.layers.linear_method import LinearMethod


@dataclass(frozen=True, slots=True)
class CpuAdapterBatch(AdapterBatch):
    """See AdapterBatch.

    Attributes:
        slots: of each token's adapter, -1 for none, [T] int32.
    """

    slots: torch.Tensor


def adapter_batch(slots: IntArray | None) -> CpuAdapterBatch | None:
    """The tokens of each adapter, from each token's slot; None where no token has one."""
    if slots is None or not (slots >= 0).any():
        return None
    groups = [
        (slot, torch.from_numpy(np.flatnonzero(slots == slot)))
        for slot in np.unique(slots).tolist()
        if slot >= 0
    ]
    return CpuAdapterBatch(groups, torch.from_numpy(slots.astype(np.int32)))


class NativeLinearAdapters(LinearAdapters):
    """The layer's own product first; then one kernel for all adapters, whose sums have an order that no batch
    changes."""

    def __init__(self, native: NativeLibrary, slots: LayerSlots) -> None:
        self._native, self.slots = native, slots

    def product(
        self,
        method: LinearMethod,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        batch: AdapterBatch,
    ) -> torch.Tensor:
        assert isinstance(batch, CpuAdapterBatch)
        out = method.apply(layer, x, bias)
        self._native.adapt(x, out, batch.slots, self.slots)
        return out
