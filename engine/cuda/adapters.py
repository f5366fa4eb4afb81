"""Adapters in the linear layers of a GPU, and how a step's tokens are sorted for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.attention.interface import IntArray
from engine.cuda.linear_method import CudaLinearMethod
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.lora.kernel import AdapterTiles, add_adapters, one_token_with_adapter
from engine.layers.adapters import AdapterBatch, LayerSlots, LinearAdapters
from engine.layers.linear_method import LinearMethod


@dataclass(frozen=True, slots=True)
class CudaAdapterBatch(AdapterBatch):
    """See AdapterBatch. `groups` are filled only where an adapter changes the embedding or the output
    projection.

    Attributes:
        tiles: the tokens by adapter.
    """

    tiles: AdapterTiles | None = None


def adapter_groups(slots: IntArray, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """The tokens of each slot, from each token's slot."""
    return [
        (slot, torch.from_numpy(np.flatnonzero(slots == slot)).to(device))
        for slot in np.unique(slots).tolist()
        if slot >= 0
    ]


def sort_tokens(slots: IntArray, block_m: int) -> tuple[IntArray, IntArray]:
    """Cuts tokens into tiles of one adapter.

    Args:
        slots: of each token's adapter, -1 for none, [T].

    Returns:
        The tokens with adapters, those of one side by side; and each tile's (slot, begin, end), [3, tiles].
    """
    order = np.argsort(slots, kind="stable")
    order = order[slots[order] >= 0]
    tiles, begin = [], 0
    for slot, count in zip(*np.unique(slots[order], return_counts=True), strict=True):
        begins = np.arange(begin, begin + count, block_m)
        begin += int(count)
        tiles.append(np.stack([np.full(len(begins), slot), begins, np.minimum(begins + block_m, begin)]))
    return order, np.concatenate(tiles, axis=1)


class CudaLinearAdapters(LinearAdapters):
    """The layer's product, then a shrink and an expand for all adapters of the step. One token's shrink is
    part of the product where that is a kernel of ours.

    Args:
        invariant: a token's numbers are the same in any batch.
    """

    def __init__(self, slots: LayerSlots, *, invariant: bool) -> None:
        self.slots, self._invariant = slots, invariant

    def product(
        self,
        method: LinearMethod,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        batch: AdapterBatch,
    ) -> torch.Tensor:
        assert isinstance(batch, CudaAdapterBatch)
        assert batch.tiles is not None
        slots, table = self.slots, self.slots.table
        if len(x) == 1 and isinstance(method, CudaLinearMethod):
            weight: torch.Tensor = layer.weight  # type: ignore[assignment]
            config = method.choose(weight, 1)
            if isinstance(config, RowsConfig):
                one: torch.Tensor = one_token_with_adapter(
                    x,
                    weight,
                    bias,
                    slots.a,
                    slots.b,
                    slots.sizes,
                    ranks=table.ranks,
                    has_vectors=table.has_vectors,
                    gain=slots.gain,
                    offset=slots.offset,
                    slot=batch.tiles.slot,
                    config=config,
                )
                return one
        out = method.apply(layer, x, bias)
        add_adapters(
            x,
            out,
            slots.a,
            slots.b,
            slots.sizes,
            ranks=table.ranks,
            has_vectors=table.has_vectors,
            gain=slots.gain,
            offset=slots.offset,
            tiles=batch.tiles,
            invariant=self._invariant,
        )
        return out
