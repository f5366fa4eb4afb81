"""Integers and tables in tiles of words, the form in which GPUs multiply by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import torch
import torch.nn.functional as F

from engine.quant.bits import unpack_words
from engine.quant.layouts.base import Layout
from engine.quant.layouts.groups import GroupedInts, Int8Groups, PackedGroups
from engine.quant.layouts.table import BITS, Outliers, TableWeights

# Outputs of a tile, and words of each of them.
TILE_ROWS, TILE_WORDS = 128, 16
# Inputs of a plane: each word has two neighbours of each plane.
PLANE = 2 * TILE_WORDS
_HALF = 16
_ZERO_BITS = 0xFF
_SIGN = 128
# Of a matrix that is repacked at a time.
_CHUNK_VALUES = 2**26


@dataclasses.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class WordTiles(Layout):
    """W[n, k] = (q[n, k] - zero) * scale, or table[n or 0, q[n, k]] * scale, with a zero and a scale for each
    output and group of inputs.

    A tile is TILE_ROWS outputs by `block` = 16 * 32 / bits inputs: 16 words for each output, 8 KiB that lie
    together, and the tiles of the same outputs follow one another. In a tile, input k is in plane
    p = k // 32 and word w = k % 32 // 2; it is field p of the word's lower half if k is even, of its upper
    half if k is odd. So `(word >> bits * p) & 0x000F000F` (0x00FF00FF, 0x00030003) are two neighbours, ready
    to become two 16-bit floats at once, and a thread that holds words w and w + 4 holds what a tensor core
    wants of it.

    Attributes:
        bits: 2, 4 or 8, of q, which has no sign.
        words: int32 [ceil(N / 128), ceil(K / block), 128, 16]; what is past N or K is any number.
        groups: int32 [ceil(N / 128), G, 128]: a scale, fp32 but for the lowest 8 bits, which are its zero.
            With a table all bits are the scale's.
        group_size: inputs that share them.
        sizes: (N, K).
        order: int32 [K]: the product takes x[:, order]; None for x as it is.
        table: fp32 [N or 1, 16]; None for integers.
        outliers: added; None for none.
    """

    bits: int
    words: torch.Tensor
    groups: torch.Tensor
    group_size: int
    sizes: tuple[int, int]
    order: torch.Tensor | None = None
    table: torch.Tensor | None = None
    outliers: Outliers | None = None

    @property
    def out_features(self) -> int:
        return self.sizes[0]

    @property
    def in_features(self) -> int:
        return self.sizes[1]

    @property
    def num_bytes(self) -> int:
        own = super(WordTiles, self).num_bytes
        return own if self.outliers is None else own + self.outliers.num_bytes

    def rows(self, begin: int, end: int) -> torch.Tensor:
        first, last = begin // TILE_ROWS, -(-end // TILE_ROWS)
        rows = slice(begin - first * TILE_ROWS, end - first * TILE_ROWS)
        codes = _unpack(self.words[first:last], self.bits)[rows, : self.in_features]
        groups = self.groups[first:last].transpose(1, 2).flatten(0, 1)[rows]
        groups = groups.repeat_interleave(self.group_size, 1)[:, : self.in_features]
        if self.table is None:
            return (codes - (groups & _ZERO_BITS)) * (groups & ~_ZERO_BITS).view(torch.float32)
        table = self.table.expand(self.out_features, -1)[begin:end]
        values = table.gather(1, codes.long()) * groups.view(torch.float32)
        return values if self.outliers is None else self.outliers.add_to(values, begin, end)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super(WordTiles, self).multiply(x if self.order is None else x[:, self.order], bias)

    def fits(self, other: Self) -> bool:
        """Matrices are joined before they are brought into this form."""
        return False

    @classmethod
    def joined(cls, layouts: Sequence[Self]) -> Self:
        raise NotImplementedError


def block_of(bits: int) -> int:
    """Inputs of a tile."""
    return PLANE * (_HALF // bits)


def tiles_of_groups(layout: GroupedInts) -> WordTiles:
    """PackedGroups or Int8Groups in tiles. A scale of fp32 loses the last 8 of its 23 bits."""
    bits = layout.bits if isinstance(layout, PackedGroups) else 8
    signed = isinstance(layout, Int8Groups)
    sizes = layout.out_features, layout.in_features

    def codes() -> Iterator[torch.Tensor]:
        for begin, end in _chunks(*sizes):
            values = layout.integers(begin, end)
            yield values.int() + _SIGN if signed else values

    scales = layout.scales.float().contiguous().view(torch.int32)
    zeros = torch.full_like(scales, layout.zero_point) if layout.zeros is None else layout.zeros.int()
    if signed:
        zeros = zeros + _SIGN
    # Rounded to the nearest that leaves the lowest bits free.
    groups = ((scales + _SIGN) & ~_ZERO_BITS) | zeros
    return WordTiles(
        bits=bits,
        words=_pack(codes(), sizes, bits),
        groups=_by_tile(groups),
        group_size=layout.group_size,
        sizes=sizes,
        order=layout.order,
    )


def tiles_of_table(layout: TableWeights) -> WordTiles:
    """TableWeights in tiles."""
    sizes = layout.out_features, layout.in_features
    scales = layout.scales
    if scales is None:
        scales = torch.ones(1, sizes[0], device=layout.words.device)
    codes = (unpack_words(layout.words[begin:end], BITS) for begin, end in _chunks(*sizes))
    return WordTiles(
        bits=BITS,
        words=_pack(codes, sizes, BITS),
        groups=_by_tile(scales.float().contiguous().view(torch.int32)),
        group_size=layout.group_size if layout.scales is not None else sizes[1],
        sizes=sizes,
        table=layout.table,
        outliers=layout.outliers,
    )


def empty_tiles(
    bits: int, sizes: tuple[int, int], group_size: int, *, table: torch.Tensor | None, device: torch.device
) -> WordTiles:
    """Tiles of a matrix of these sizes (N, K), unfilled."""
    num_tiles, num_groups = -(-sizes[0] // TILE_ROWS), -(-sizes[1] // group_size)
    blocks = -(-sizes[1] // block_of(bits))
    shape = (num_tiles, blocks, TILE_ROWS, TILE_WORDS)
    return WordTiles(
        bits=bits,
        words=torch.empty(shape, dtype=torch.int32, device=device),
        groups=torch.empty(num_tiles, num_groups, TILE_ROWS, dtype=torch.int32, device=device),
        group_size=group_size,
        sizes=sizes,
        table=table,
    )


def _chunks(out_features: int, in_features: int) -> Iterator[tuple[int, int]]:
    """(first, end) of outputs that are repacked together: whole tiles."""
    step = max(1, _CHUNK_VALUES // in_features // TILE_ROWS) * TILE_ROWS
    for begin in range(0, out_features, step):
        yield begin, min(begin + step, out_features)


def _pack(chunks: Iterator[torch.Tensor], sizes: tuple[int, int], bits: int) -> torch.Tensor:
    """Outputs of codes int32 [n, K], in turn, as tiles of words."""
    block, planes = block_of(bits), _HALF // bits
    blocks = -(-sizes[1] // block)
    parts = []
    for codes in chunks:
        padded = F.pad(codes, (0, blocks * block - sizes[1], 0, -len(codes) % TILE_ROWS))
        fields = padded.view(-1, TILE_ROWS, blocks, planes, TILE_WORDS, 2)
        words = torch.zeros_like(fields[..., 0, :, 0])
        for plane in range(planes):
            for half in range(2):
                words |= fields[..., plane, :, half] << (bits * plane + _HALF * half)
        parts.append(words.transpose(1, 2).contiguous())
    return torch.cat(parts)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles of words -> codes int32 [128 * tiles, all inputs]."""
    device = words.device
    planes = torch.arange(_HALF // bits, dtype=torch.int32, device=device) * bits
    shifts = planes[:, None, None] + torch.arange(2, dtype=torch.int32, device=device) * _HALF
    fields: torch.Tensor = (words.transpose(1, 2)[..., None, :, None] >> shifts) & (2**bits - 1)
    return fields.flatten(2).flatten(0, 1)


def _by_tile(groups: torch.Tensor) -> torch.Tensor:
    """[G, N] -> [ceil(N / 128), G, 128]."""
    padded = F.pad(groups, (0, -groups.shape[1] % TILE_ROWS))
    return padded.view(len(groups), -1, TILE_ROWS).transpose(0, 1).contiguous()
