"""Integers whose scales, and zero points, are shared by groups of inputs. Inputs of products stay as they
are."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

from engine.quant.bits import unpack_words
from engine.quant.layouts.base import Layout, join, same, spread


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class GroupedInts(Layout):
    """W[n, k] = (q[n, k] - zero) * scales[k // group_size, n].

    Attributes:
        scales: [G, N] with G = ceil(K / group_size), in the dtype that the checkpoint has them in (fp16, bf16
            or fp32).
        group_size: inputs that share a scale: K for a scale an output.
        zeros: [G, N], of the kind of the integers; None where all zero points are `zero_point`.
        zero_point: of all, where there are no `zeros`.
        order: int32 [K]: the product takes x[:, order]; None for x as it is. Files with act-order group
            inputs that are not neighbours; here they are.
    """

    scales: torch.Tensor
    group_size: int
    zeros: torch.Tensor | None
    zero_point: int
    order: torch.Tensor | None

    @abstractmethod
    def integers(self, begin: int, end: int) -> torch.Tensor:
        """The integers of these outputs, [end - begin, K], of any dtype that holds them."""

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        in_features = self.in_features
        values = self.integers(begin, end).float()
        if self.zeros is None:
            values = values - self.zero_point
        else:
            values = values - spread(self.zeros[:, begin:end], self.group_size, in_features)
        return values * spread(self.scales[:, begin:end], self.group_size, in_features)

    def weight(self) -> torch.Tensor:
        rows = self.rows(0, self.out_features)
        if self.order is None:
            return rows
        weight = torch.empty_like(rows)
        weight[:, self.order.long()] = rows
        return weight

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super(GroupedInts, self).multiply(x if self.order is None else x[:, self.order], bias)

    def fits(self, other: Self) -> bool:
        # Zero points that are the same for one matrix and not for the other would have to be spread out.
        return (
            self.group_size == other.group_size
            and self.scales.dtype == other.scales.dtype
            and (self.zeros is None) == (other.zeros is None)
            and self.zero_point == other.zero_point
            and same(self.order, other.order)
        )

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        return dataclasses.replace(
            layouts[0],
            scales=torch.cat([layout.scales for layout in layouts], 1),
            zeros=join([layout.zeros for layout in layouts], 1),
        )


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PackedGroups(GroupedInts):
    """Integers without a sign of 2 or 4 bits. Those of 3 bits in files have 4 here.

    Attributes:
        bits: 2 or 4.
        words: int32 [N, K * bits / 32], see `pack_words`. `zeros` are uint8.
    """

    bits: int
    words: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 32 // self.bits

    def integers(self, begin: int, end: int) -> torch.Tensor:
        return unpack_words(self.words[begin:end], self.bits)

    def fits(self, other: Self) -> bool:
        return self.bits == other.bits and super(PackedGroups, self).fits(other)

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        whole = super(PackedGroups, cls).joined(layouts)
        return dataclasses.replace(whole, words=torch.cat([layout.words for layout in layouts]))


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Int8Groups(GroupedInts):
    """Integers of 8 bits with a sign. Those without one in files are 128 less here, and so are their zero
    points.

    Attributes:
        codes: int8 [N, K]. `zeros` are int8.
    """

    codes: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def integers(self, begin: int, end: int) -> torch.Tensor:
        return self.codes[begin:end]

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        whole = super(Int8Groups, cls).joined(layouts)
        return dataclasses.replace(whole, codes=torch.cat([layout.codes for layout in layouts]))
