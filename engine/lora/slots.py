"""The slots of a device: memory for the adapters in use, in every layer.

Linear layers have memory for every slot from the start, because captured graphs and kernels keep its address.
What adapters do to the token embedding and the output projection is rare and large, so memory for it is taken
when such an adapter comes, and steps with one take no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import WorkerConfig
from engine.layers.adapters import (
    AdapterBatch,
    EmbeddingAdapters,
    LayerSlots,
    LinearAdapters,
    SlotTable,
)
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearMethod
from engine.lora.fit import RANK_STEP, FittedAdapter, FittedLayer, FittedTable, ModelPlaces
from engine.models.base import CausalLM

# How a device multiplies in a layer that has this memory.
MakeLinearAdapters = Callable[[LayerSlots], LinearAdapters]
# Input features whose rows of a base matrix are looked at together, to find their lengths.
_FEATURES_AT_ONCE = 1024


class AdapterSlots:
    """Owns the memory. The thread that runs steps calls everything here.

    Args:
        model: its layers multiply by what is in the slots from now on.
        num_slots: adapters in use at once.
        max_rank: of any adapter.
        make: how the device multiplies.

    Attributes:
        places: the model's matrices by name.
        max_rank: in memory, a multiple of RANK_STEP.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        num_slots: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
        make: MakeLinearAdapters,
    ) -> None:
        self.places = ModelPlaces(model, dtype)
        self.num_slots, self._device, self._dtype = num_slots, device, dtype
        self.max_rank = -(-max_rank // RANK_STEP) * RANK_STEP
        ranks, has_vectors = (self._zeros(num_slots, kind=torch.int32) for _ in range(2))
        self.table = SlotTable(ranks, has_vectors)
        self._memory: dict[str, LayerSlots] = {}
        for name, layer in self.places.linear.items():
            memory = self._memory[name] = self._allocate(layer)
            layer.adapters = make(memory)
        self._embeddings, self._heads = SlotEmbeddings(), SlotHeads()
        self._tables: set[int] = set()
        model.adapter_tables = self._tables
        if self.places.embedding is not None:
            self.places.embedding.adapters = self._embeddings
        if self.places.head is not None:
            self.places.head.adapters = self._heads

    def _zeros(self, *shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind, device=self._device)

    def _allocate(self, layer: LinearLayer) -> LayerSlots:
        parts = layer.parts.values()
        in_features = next(iter(parts)).inputs.size
        slots, out, rank = self.num_slots, layer.out_features, self.max_rank
        return LayerSlots(
            a=self._zeros(slots, len(parts), rank, in_features, kind=self._dtype),
            b=self._zeros(slots, out, rank, kind=self._dtype),
            gain=self._zeros(slots, out, kind=torch.float32) + 1,
            offset=self._zeros(slots, out, kind=torch.float32),
            sizes=tuple(part.outputs.size for part in parts),
            table=self.table,
        )

    @property
    def num_bytes(self) -> int:
        """Of the linear layers' memory, which is there from the start."""
        return sum(each.num_bytes for each in self._memory.values())

    @torch.inference_mode()
    def place(self, slot: int, adapter: FittedAdapter) -> Iterator[None]:
        """Copies an adapter into a slot that no step in flight uses, a layer at a time: copies are started
        and not waited for.

        Raises:
            torch.OutOfMemoryError: there is no memory for a whole embedding or projection.
        """
        self.clear(slot)
        has_vectors = False
        for name, memory in self._memory.items():
            fitted = adapter.layers.get(name)
            has_vectors |= self._place_layer(slot, memory, self.places.linear[name], fitted, adapter.rank)
            yield
        if adapter.has_tables:
            self._tables.add(slot)
        if adapter.embedding is not None:
            self._embeddings.tables[slot] = self._on_device(adapter.embedding)
        if adapter.head is not None:
            self._heads.tables[slot] = self._on_device(adapter.head)
        self.table.ranks[slot] = adapter.rank
        self.table.has_vectors[slot] = int(has_vectors)

    def clear(self, slot: int) -> None:
        """Gives back what a slot's adapter had beyond the memory that is always there."""
        self._tables.discard(slot)
        self._embeddings.tables.pop(slot, None)
        self._heads.tables.pop(slot, None)

    def _place_layer(
        self, slot: int, memory: LayerSlots, layer: LinearLayer, fitted: FittedLayer | None, rank: int
    ) -> bool:
        """Returns whether the layer has a gain or an offset."""
        a, b = memory.a[slot, :, :rank], memory.b[slot, :, :rank]
        a.zero_()
        b.zero_()
        memory.gain[slot].fill_(1)
        memory.offset[slot].zero_()
        if fitted is None:
            return False
        first = 0
        for index, size in enumerate(memory.sizes):
            if index in fitted.a:
                own_a, own_b = fitted.a[index], fitted.b[index]
                a[index, : len(own_a)].copy_(own_a, non_blocking=True)
                b[first : first + size, : len(own_a)].copy_(own_b, non_blocking=True)
            first += size
        if fitted.offset is not None:
            memory.offset[slot].copy_(fitted.offset, non_blocking=True)
        if fitted.magnitude is not None:
            self._set_gain(slot, memory, layer, fitted.magnitude)
        return fitted.offset is not None or fitted.magnitude is not None

    def _set_gain(self, slot: int, memory: LayerSlots, layer: LinearLayer, magnitude: torch.Tensor) -> None:
        """DoRA: the rows of W + B A are brought to these lengths, so what they make is multiplied by as much.
        The layer's bias is not; see LayerSlots for the order."""
        magnitude = magnitude.to(self._device)
        gain = magnitude / _row_lengths(layer, memory, slot)
        gain = torch.where(magnitude.isnan(), torch.ones_like(gain), gain)
        memory.gain[slot].copy_(gain)
        memory.b[slot].mul_(gain.unsqueeze(1).to(self._dtype))
        if layer.bias is not None:
            memory.offset[slot].add_((1 - gain) * layer.bias.float())

    def _on_device(self, table: FittedTable) -> FittedTable:
        tensors = (table.weight, table.a, table.b, table.offset)
        return FittedTable(*(None if each is None else each.to(self._device) for each in tensors))


def _row_lengths(layer: LinearLayer, memory: LayerSlots, slot: int) -> torch.Tensor:
    """The lengths of the rows of W + B A in fp32, [out]. W is whatever the layer multiplies by: it is asked
    for the products of unit vectors, so that any number format will do."""
    in_features, device = memory.a.shape[-1], memory.a.device
    squares = torch.zeros(layer.out_features, device=device)
    for begin in range(0, in_features, _FEATURES_AT_ONCE):
        end = min(begin + _FEATURES_AT_ONCE, in_features)
        units = torch.zeros(end - begin, in_features, dtype=memory.a.dtype, device=device)
        units[:, begin:end].fill_diagonal_(1)
        columns = layer.method.apply(layer, units, None).float()
        first = 0
        for index, size in enumerate(memory.sizes):
            a, b = memory.a[slot, index, :, begin:end].float(), memory.b[slot, first : first + size].float()
            columns[:, first : first + size] += a.T @ b.T
            first += size
        squares += columns.square().sum(0)
    return squares.sqrt()


def make_slots(
    model: CausalLM,
    config: WorkerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    make: MakeLinearAdapters,
) -> AdapterSlots:
    """The slots that a worker's configuration asks for."""
    return AdapterSlots(
        model,
        num_slots=config.max_loras,
        max_rank=config.max_lora_rank,
        device=device,
        dtype=dtype,
        make=make,
    )


class TorchLinearAdapters(LinearAdapters):
    """By torch's operators, one adapter after the other: what the kernels' results are compared with."""

    def __init__(self, slots: LayerSlots) -> None:
        self.slots = slots

    def product(
        self,
        method: LinearMethod,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        batch: AdapterBatch,
    ) -> torch.Tensor:
        out = method.apply(layer, x, bias)
        for slot, index in batch.groups:
            self._add(slot, index, x.index_select(0, index), out)
        return out

    def _add(self, slot: int, index: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self.slots
        changed = out.index_select(0, index).float()
        if slots.table.has_vectors[slot]:
            changed = changed * slots.gain[slot] + slots.offset[slot]
        rank = int(slots.table.ranks[slot])
        first = 0
        for part, size in enumerate(slots.sizes):
            shrunk = F.linear(x, slots.a[slot, part, :rank]).float()
            end = first + size
            changed[:, first:end] += F.linear(shrunk, slots.b[slot, first:end, :rank].float())
            first = end
        out.index_copy_(0, index, changed.to(out.dtype))


class SlotEmbeddings(EmbeddingAdapters):
    """The slots whose adapters change the token embedding."""

    def __init__(self) -> None:
        self.tables: dict[int, FittedTable] = {}

    def changed(self, token_ids: torch.Tensor, hidden: torch.Tensor, batch: AdapterBatch) -> torch.Tensor:
        for slot, index in batch.groups:
            table = self.tables.get(slot)
            if table is None:
                continue
            ids = token_ids.index_select(0, index).long()
            if table.weight is not None:
                hidden = hidden.index_copy(0, index, table.weight.index_select(0, ids))
            if table.a is not None and table.b is not None:
                added = F.linear(table.a.index_select(1, ids).T, table.b)
                hidden = hidden.index_add(0, index, added)
        return hidden


class SlotHeads(LinearAdapters):
    """The slots whose adapters change the output projection."""

    def __init__(self) -> None:
        self.tables: dict[int, FittedTable] = {}

    def product(
        self,
        method: LinearMethod,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        batch: AdapterBatch,
    ) -> torch.Tensor:
        out = method.apply(layer, x, bias)
        for slot, index in batch.groups:
            table = self.tables.get(slot)
            if table is None:
                continue
            rows = x.index_select(0, index)
            if table.weight is not None:
                out = out.index_copy(0, index, F.linear(rows, table.weight))
            if table.a is not None and table.b is not None:
                out = out.index_add(0, index, F.linear(F.linear(rows, table.a), table.b))
            if table.offset is not None:
                out = out.index_add(0, index, table.offset.to(out.dtype).expand(len(index), -1))
        return out
