"""Weights that are entries of small tables, with outliers apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch

from engine.quant.bits import unpack_words
from engine.quant.layouts.base import Layout, join, same, spread

ENTRIES = 16
BITS = 4


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Outliers:
    """A sparse matrix [N, K] in CSR form that is added to a dense one.

    Attributes:
        row_starts: int32 [N + 1]: those of output n are from row_starts[n] to row_starts[n + 1].
        columns: int32 [count]: the input of each.
        values: fp32 [count].
        starts: row_starts, on the host.
    """

    row_starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    starts: tuple[int, ...]

    @staticmethod
    def make(row_starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> Outliers:
        """Waits for the device."""
        return Outliers(
            row_starts=row_starts, columns=columns, values=values, starts=tuple(row_starts.tolist())
        )

    @property
    def out_features(self) -> int:
        """N."""
        return len(self.starts) - 1

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self.row_starts.nbytes + self.columns.nbytes + self.values.nbytes

    def add_to(self, rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """rows [end - begin, K] fp32 with those of these outputs added."""
        first, last = self.starts[begin], self.starts[end]
        counts = self.row_starts[begin + 1 : end + 1] - self.row_starts[begin:end]
        outputs = torch.repeat_interleave(counts, output_size=last - first)
        at = outputs.long() * rows.shape[1] + self.columns[first:last]
        return rows.view(-1).index_add(0, at, self.values[first:last]).view(rows.shape)

    @staticmethod
    def joined(parts: Sequence[Outliers | None], sizes: Sequence[int]) -> Outliers | None:
        """Of several matrices of so many outputs each, their outputs in turn."""
        there = [part for part in parts if part is not None]
        if not there:
            return None
        row_starts = [there[0].row_starts.new_zeros(1)]
        before = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is None:
                row_starts.append(row_starts[0].new_full((size,), before))
            else:
                row_starts.append(part.row_starts[1:] + before)
                before += part.starts[-1]
        columns = torch.cat([part.columns for part in there])
        values = torch.cat([part.values for part in there])
        return Outliers.make(torch.cat(row_starts), columns, values)


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class TableWeights(Layout):
    """W[n, k] = table[n or 0, q[n, k]] * scales[k // group_size, n] + outliers[n, k].

    Attributes:
        words: int32 [N, K / 8]: q, 4 bits each, see `pack_words`. Those of 3 bits in files have 4 here.
        table: fp32 [N, 16], one for each output (SqueezeLLM), or [1, 16], one for all (NF4).
        scales: fp32 [ceil(K / group_size), N], or None for none.
        group_size: inputs that share a scale.
        outliers: added; None for none.
    """

    words: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor | None
    group_size: int
    outliers: Outliers | None

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 32 // BITS

    def rows(self, begin: int, end: int) -> torch.Tensor:
        codes = unpack_words(self.words[begin:end], BITS)
        is_shared = len(self.table) == 1
        rows = self.table[0][codes] if is_shared else self.table[begin:end].gather(1, codes.long())
        if self.scales is not None:
            rows = rows * spread(self.scales[:, begin:end], self.group_size, self.in_features)
        return rows if self.outliers is None else self.outliers.add_to(rows, begin, end)

    def fits(self, other: Self) -> bool:
        alike = self.group_size == other.group_size and (self.scales is None) == (other.scales is None)
        return alike and (len(self.table) > 1) == (len(other.table) > 1)

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        sizes = [layout.out_features for layout in layouts]
        table = layouts[0].table
        if len(table) > 1:
            table = torch.cat([layout.table for layout in layouts])
        elif not all(same(table, layout.table) for layout in layouts):
            table = torch.cat([layout.table.expand(layout.out_features, -1) for layout in layouts])
        return dataclasses.replace(
            layouts[0],
            words=torch.cat([layout.words for layout in layouts]),
            table=table,
            scales=join([layout.scales for layout in layouts], 1),
            outliers=Outliers.joined([layout.outliers for layout in layouts], sizes),
        )

    @property
    def num_bytes(self) -> int:
        own = super(TableWeights, self).num_bytes
        return own if self.outliers is None else own + self.outliers.num_bytes
