"""Weights in tiles of words, and how they become numbers.

A tile is 128 outputs by 16 words of 32 bits each, which hold 512 / bits inputs: engine/quant/layouts/tiles.py
describes it. What matters here: `(word >> bits * plane) & mask` are two neighbours in the word's halves.
With the exponent of 128 (bf16) or 1024 (fp16) put before them they are two floats, too large by that much;
one instruction for two takes it off again, together with the zero point. Integers of so few bits are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import settle_keys

TILE_ROWS = tl.constexpr(128)
TILE_WORDS = tl.constexpr(16)
PLANE = tl.constexpr(32)
# Of an H100's or H200's multiprocessor, less what kernels need beside their operands.
_SHARED_BYTES = 220 << 10
# Tokens of a tile whose sums are in registers twice.
MOST_SUMS = 128


@dataclass(frozen=True, slots=True)
class WordMatrix:
    """A matrix [N, K] in tiles, or several below one another.

    Attributes:
        words: int32 [tiles, K / BLOCK_K rounded up, 128, 16].
        groups: int32 [tiles, G, 128]: scales, fp32 but for the lowest 8 bits, which are the zero; with a
            table all bits are the scale's.
        n, k: of each matrix.
        bits: 2, 4 or 8 of each weight.
        group_size: inputs that share a scale.
        table: fp32 [1 or N, 16]: weights number its entries; None for integers.
    """

    words: torch.Tensor
    groups: torch.Tensor
    n: int
    k: int
    bits: int
    group_size: int
    table: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the words and their scales."""
        return self.words.nbytes + self.groups.nbytes

    @property
    def kind(self) -> str:
        """Of the weights, by which kernels are chosen."""
        return f"table{self.bits}" if self.table is not None else f"int{self.bits}"

    @property
    def block_k(self) -> int:
        """Inputs of a tile."""
        return 32 * (16 // self.bits)

    @property
    def blocks(self) -> int:
        """Tiles along K."""
        return self.words.shape[1]

    @property
    def is_one_group(self) -> bool:
        """Whether a scale is an output's."""
        return self.groups.shape[1] == 1

    @property
    def fits_tiles(self) -> bool:
        """Whether groups begin and end with planes, and rows of tokens are aligned to 16 bytes."""
        return (self.is_one_group or self.group_size % 32 == 0) and self.k % 8 == 0

    def scales_weights(self, block_m: int) -> bool:
        """Whether scales are multiplied into weights of 16 bits, which are rounded once more. Into sums of
        fp32 they are only where that is little work and takes few registers."""
        if self.is_one_group:
            return False
        return self.group_size % self.block_k != 0 or block_m > MOST_SUMS

    def stages(self, block_m: int, block_n: int, most: int) -> int:
        """Blocks of K in flight, at most so many, that shared memory has room for."""
        return min(most, _SHARED_BYTES // (2 * block_m * self.block_k + 64 * block_n))

    def descriptor(self, block_n: int) -> TensorDescriptor:
        """Of the words of all tiles, for so many outputs at a time."""
        rows = self.words.shape[0] * self.words.shape[1] * self.words.shape[2]
        return TensorDescriptor(self.words.view(rows, 16), [rows, 16], [16, 1], [block_n, 16])

    @property
    def constants(self) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        rows = 0 if self.table is None else self.table.shape[0]
        return {
            "BITS": self.bits,
            "GROUP": 0 if self.is_one_group else self.group_size,
            "BLOCK_K": self.block_k,
            "TABLES": min(rows, 2),
            "PACKED": not triton.knobs.runtime.interpret,
        }


@triton.jit
def first_word_row(first_n, block, blocks):
    """Of the words of all tiles as rows of 16, the first of block number `block` along K of the outputs from
    `first_n` on."""
    return (first_n // TILE_ROWS * blocks + block) * TILE_ROWS + first_n % TILE_ROWS


@triton.jit
def group_addresses(groups_ptr, first_n, groups, BLOCK_N: tl.constexpr):
    """Where the scales and zeros of the outputs from `first_n` on are, of the first group, [BLOCK_N]."""
    first = first_n // TILE_ROWS * groups * TILE_ROWS + first_n % TILE_ROWS
    return groups_ptr + first + tl.arange(0, BLOCK_N)


@triton.jit
def load_groups(addresses, block, groups, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_N, 1] for block number `block` along K, or [BLOCK_N, planes] where its planes may be of
    different groups; addresses as of `group_addresses`, of so many groups."""
    if GROUP == 0:
        loaded = tl.load(addresses[:, None])
    elif GROUP % BLOCK_K == 0:
        group = tl.minimum(block * BLOCK_K // GROUP, groups - 1)
        loaded = tl.load(addresses[:, None] + group * TILE_ROWS)
    else:
        first_k = block * BLOCK_K + tl.arange(0, BLOCK_K // PLANE) * PLANE
        group = tl.minimum(first_k // GROUP, groups - 1)
        loaded = tl.load(addresses[:, None] + group[None, :] * TILE_ROWS)
    return loaded


@triton.jit
def scales_of(groups, TABLES: tl.constexpr):
    """int32 -> fp32."""
    if TABLES == 0:
        groups = groups & -256
    return groups.to(tl.float32, bitcast=True)


@triton.jit
def _as_pairs(values):
    # 16-bit floats -> int32 with each in both halves.
    bits = values.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def _halves(pairs, dtype: tl.constexpr):
    low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _integer_pairs(shifted, groups, dtype: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr):
    # Two integers that are the lowest bits of a word's halves, as 16-bit floats: the exponent of 128 (bf16)
    # or 1024 (fp16) is put before them in one instruction, and another takes it and the zero off again.
    mask = shifted * 0 + ((1 << BITS) - 1) * 0x10001
    zeros = groups & 0xFF
    if dtype == tl.bfloat16:
        less = zeros | 0xC300
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 v, one; mov.b32 one, 0x3F803F80; lop3.b32 v, $1, $2, 0x43004300, 0xEA;"
            " fma.rn.bf16x2 $0, v, one, $3; }",
            "=r,r,r,r",
            [shifted, mask, less | (less << 16)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }",
                "=r,r,r",
                [pairs, _as_pairs(scales_of(groups, 0).to(dtype))],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        less = zeros | 0xE400
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 v; lop3.b32 v, $1, $2, 0x64006400, 0xEA; add.rn.f16x2 $0, v, $3; }",
            "=r,r,r,r",
            [shifted, mask, less | (less << 16)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;",
                "=r,r,r",
                [pairs, _as_pairs(scales_of(groups, 0).to(dtype))],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    return pairs


@triton.jit
def _integer_values(
    shifted, groups, dtype: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # The numbers of the lower and of the upper halves.
    if PACKED and (dtype == tl.float16 or (dtype == tl.bfloat16 and BITS < 8)):
        low, high = _halves(_integer_pairs(shifted, groups, dtype, BITS, SCALED), dtype)
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        # fp32's 2 ** 23 and the integer, without a conversion.
        less = ((groups & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        low = ((shifted & MASK) | 0x4B000000).to(tl.float32, bitcast=True) - less
        high = (((shifted >> 16) & MASK) | 0x4B000000).to(tl.float32, bitcast=True) - less
        if SCALED:
            low *= scales_of(groups, 0)
            high *= scales_of(groups, 0)
    return low.to(dtype), high.to(dtype)


@triton.jit
def _look_up(addresses, PACKED: tl.constexpr):
    # What Triton knows to be a load, it would copy to shared memory some stages ahead, as it does with words.
    if PACKED:
        entries = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [addresses], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        entries = tl.load(addresses)
    return entries


@triton.jit
def _table_values(shifted, groups, tables, dtype: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr):
    tables = tables[:, None, None]
    low = _look_up(tables + (shifted & 0xF), PACKED)
    high = _look_up(tables + ((shifted >> 16) & 0xF), PACKED)
    if SCALED:
        low *= scales_of(groups, 1)
        high *= scales_of(groups, 1)
    return low.to(dtype), high.to(dtype)


@triton.jit
def table_rows(table_ptr, first_n, n, TABLES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where each output's table begins, [BLOCK_N]."""
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1)
    if TABLES == 1:
        rows = rows * 0
    return table_ptr + rows * 16


@triton.jit
def values_of(
    words, groups, tables, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BITS: tl.constexpr, TABLES: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The weights [BLOCK_N, BLOCK_K] that are in words [BLOCK_N, 16], with or without their scales.

    Args:
        groups: as `load_groups` returns them.
        tables: as `table_rows` returns them.
    """
    shifts = tl.arange(0, BLOCK_K // PLANE) * BITS
    shifted = words[:, None, :] >> shifts[None, :, None]  # the integers of a plane are lowest in their halves
    groups = groups[:, :, None]
    if TABLES:
        low, high = _table_values(shifted, groups, tables, dtype, SCALED, PACKED)
    else:
        low, high = _integer_values(shifted, groups, dtype, BITS, SCALED, PACKED)
    return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))


settle_keys(
    first_word_row,
    group_addresses,
    scales_of,
    _as_pairs,
    _halves,
    table_rows,
    load_groups,
    _integer_pairs,
    _integer_values,
    _look_up,
    _table_values,
    values_of,
)
