"""Quantized weights by the native kernels: integers in groups of inputs, whatever format they had."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch

from engine.cpu.kernels.blocks import BLOCK
from engine.cpu.kernels.library import NativeLibrary, PackedMatrix
from engine.quant.layouts.base import Layout
from engine.quant.layouts.groups import GroupedInts, Int8Groups, PackedGroups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.products import LayoutProducts


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class NativeGroups(Layout):
    """Integers in panels. Their numbers are those of the layout that they were made of, exactly; inputs of
    products are rounded to 8 bits, each 32 with a scale of their own.

    Attributes:
        order: int64 [K]: the product takes x[:, order]; None for x as it is.
    """

    native: NativeLibrary
    packed: PackedMatrix
    order: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.packed.rows

    @property
    def in_features(self) -> int:
        return self.packed.columns

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.native.embed(torch.arange(begin, end), self.packed)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.native.multiply(x if self.order is None else x[:, self.order], self.packed, bias)

    def fits(self, other: Self) -> bool:
        """Layouts are joined before they take this form."""
        return False

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        return self.packed.panels.nbytes


class NativeProducts(LayoutProducts):
    """Integers become panels where their groups are whole blocks; everything else is multiplied by torch."""

    def __init__(self, native: NativeLibrary) -> None:
        super().__init__(
            forms={PackedGroups: self._groups, Int8Groups: self._groups, Int8Channels: self._channels}
        )
        self._native = native

    def _groups(self, layout: GroupedInts) -> Layout:
        columns = layout.in_features
        group_size = min(layout.group_size, columns)
        if columns % BLOCK or group_size % BLOCK:
            return layout
        bits = 8 if isinstance(layout, Int8Groups) else 4
        dtype = torch.int8 if bits == 8 else torch.uint8
        codes = torch.cat([layout.integers(*tile).to(dtype) for tile in layout.tiles()])
        scales = layout.scales.float().T
        zeros = layout.zero_point if layout.zeros is None else layout.zeros.float().T
        packed = self._native.pack_groups(bits, codes, scales, -zeros * scales, group_size)
        order = None if layout.order is None else layout.order.long()
        return NativeGroups(native=self._native, packed=packed, order=order)

    def _channels(self, layout: Int8Channels) -> Layout:
        """Inputs are rounded for each 32 of them, which is closer than what the checkpoint asks for: for each
        token, or by one scale."""
        columns = layout.in_features
        if columns % BLOCK:
            return layout
        scales = layout.scales[:, None]
        packed = self._native.pack_groups(8, layout.codes, scales, torch.zeros_like(scales), columns)
        return NativeGroups(native=self._native, packed=packed, order=None)
