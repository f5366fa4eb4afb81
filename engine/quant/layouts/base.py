"""What all layouts of quantized weights have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import nn

# Of a matrix that the reference product has in full precision at a time.
TILE_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Layout(ABC):
    """A matrix [N, K] of N outputs and K inputs in quantized form. Fields that are tensors are on the device
    that computes with them; nothing changes them.
    """

    @property
    @abstractmethod
    def out_features(self) -> int:
        """N."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """K."""

    @abstractmethod
    def rows(self, begin: int, end: int) -> torch.Tensor:
        """What the outputs from `begin` to `end` stand for, [end - begin, K] fp32. Their inputs are in the
        order in which `multiply` takes them; see `weight`."""

    @abstractmethod
    def fits(self, other: Self) -> bool:
        """Whether another matrix of the same inputs can come after this one in a joined one."""

    @classmethod
    @abstractmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        """Several matrices that fit as one, their outputs in turn."""

    def weight(self) -> torch.Tensor:
        """The matrix that it stands for, [N, K] fp32, its inputs in the model's order."""
        return self.rows(0, self.out_features)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The reference product: x [T, K] -> [T, N] of the same dtype. Tiles of the weights are dequantized
        to x's dtype; no more than TILE_ELEMENTS are at any time."""
        parts = [
            F.linear(x, self.rows(begin, end).to(x.dtype), None if bias is None else bias[begin:end])
            for begin, end in self.tiles()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(first, end) of the outputs of each tile."""
        step = max(8, TILE_ELEMENTS // self.in_features // 8 * 8)
        for begin in range(0, self.out_features, step):
            yield begin, min(begin + step, self.out_features)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def layouts_of(model: nn.Module) -> Iterator[Layout]:
    """Those of all layers of a model that is loaded."""
    for module in model.modules():
        yield from cast(Sequence[Layout], getattr(module, "layouts", ()))


def join_runs(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """As few layouts as there can be of a fused layer's matrices, in order: each run of those that fit
    together becomes one."""
    runs: list[list[Layout]] = []
    for layout in layouts:
        if runs and type(runs[-1][-1]) is type(layout) and runs[-1][-1].fits(layout):
            runs[-1].append(layout)
        else:
            runs.append([layout])
    return tuple(run[0] if len(run) == 1 else type(run[0]).joined(run) for run in runs)


def join(tensors: list[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    """Tensors that all are there, or none is, one after the other."""
    if any(tensor is None for tensor in tensors):
        assert all(tensor is None for tensor in tensors)
        return None
    return torch.cat(cast(list[torch.Tensor], tensors), dim)


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether both are missing, or have the same values; tensors without numbers may."""
    if first is None or second is None:
        return first is second
    if first.is_meta:
        return True
    return torch.equal(first, second)


def spread(scales: torch.Tensor, group_size: int, in_features: int) -> torch.Tensor:
    """scales [groups, N] -> one for each weight, [N, K] fp32."""
    return scales.float().T.repeat_interleave(group_size, 1)[:, :in_features]
