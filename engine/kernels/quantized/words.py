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


@dataclass(frozen=True, slots=True)
class WordMatrix:
    """A matrix [N, K] in tiles, or several below one another.

    Attributes:
        words: int32 [tiles, K / BLOCK_K rounded up, 128, 16].
        groups: int32 [tiles, G, 128]: scales, fp32 but for the lowest 8 bits, which are the zero; with a table
            all bits are the scale's.
        n, k: of each matrix.
        bits: 2, 4 or 8 of each weight.
        group_size: inputs that share a scale.
        table: [1 or N, 16] of the tokens' dtype: weights number its entries; None for integers.
    """

    words: torch.Tensor
    groups: torch.Tensor
    n: int
    k: int
    bits: int
    group_size: int
    table: torch.Tensor | None = None

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
    def step_k(self) -> int:
        """Inputs that are multiplied before a scale is applied: those of a tile, or fewer where a tile has
        several groups."""
        return self.block_k if self.is_one_group or self.group_size % self.block_k == 0 else 32

    @property
    def is_one_group(self) -> bool:
        """Whether a scale is an output's."""
        return self.groups.shape[1] == 1

    @property
    def fits_tiles(self) -> bool:
        """Whether groups begin and end with planes, and rows of tokens are aligned to 16 bytes."""
        return (self.is_one_group or self.group_size % 32 == 0) and self.k % 8 == 0

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
    """Where the scales and zeros of the outputs from `first_n` on are, those of the first group, [BLOCK_N]."""
    first = first_n // TILE_ROWS * groups * TILE_ROWS + first_n % TILE_ROWS
    return groups_ptr + first + tl.arange(0, BLOCK_N)


@triton.jit
def scales_of(groups, TABLES: tl.constexpr):
    """int32 -> fp32."""
    if TABLES == 0:
        groups = groups & -256
    return groups.to(tl.float32, bitcast=True)


@triton.jit
def pairs_of(words, first: tl.constexpr, planes: tl.constexpr, BITS: tl.constexpr):
    """Words [N, 16] -> int32 [N, planes, 16] of the planes from the first on, whose halves are neighbours."""
    mask: tl.constexpr = ((1 << BITS) - 1) * 0x10001
    shifts = (first + tl.arange(0, planes)) * BITS
    return (words[:, None, :] >> shifts[None, :, None]) & mask


@triton.jit
def _halves(pairs, dtype: tl.constexpr):
    low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _add_pairs(first, second, dtype: tl.constexpr):
    # Two sums of 16-bit floats in one instruction.
    if dtype == tl.bfloat16:
        total = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r",
            [first, second],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        total = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;",
            "=r,r,r",
            [first, second],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def integer_values(pairs, zeros, dtype: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Pairs of integers [N, P, 16] less zeros [N], as numbers [N, 32 * P]."""
    zeros = zeros[:, None, None]
    if PACKED and (BITS < 8 or dtype == tl.float16):
        # 0x4300 is bf16's 128, 0x6400 fp16's 1024; with a sign, 0xC300 and 0xE400.
        if dtype == tl.bfloat16:
            less = zeros | 0xC300
            floats = pairs | 0x43004300
        else:
            less = zeros | 0xE400
            floats = pairs | 0x64006400
        low, high = _halves(_add_pairs(floats, less | (less << 16), dtype), dtype)
    else:
        # fp32's 2 ** 23 and the integer, without a conversion.
        less = (zeros | 0x4B000000).to(tl.float32, bitcast=True)
        low = ((pairs & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
        high = (((pairs >> 16) & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
        low, high = (low - less).to(dtype), (high - less).to(dtype)
    values = tl.join(low, high)
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2] * 2))


@triton.jit
def table_values(pairs, tables, dtype: tl.constexpr):
    """Entries [N, 32 * P] that pairs [N, P, 16] number, of the table at the address `tables` [N]."""
    tables = tables[:, None, None]
    low = tl.load(tables + (pairs & 0xF)).to(dtype)
    high = tl.load(tables + (pairs >> 16)).to(dtype)
    values = tl.join(low, high)
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2] * 2))


@triton.jit
def table_rows(table_ptr, first_n, n, TABLES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where each output's table begins, [BLOCK_N]."""
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1)
    if TABLES == 1:
        rows = rows * 0
    return table_ptr + rows * 16


@triton.jit
def values_of(
    words, zeros, tables, first: tl.constexpr, planes: tl.constexpr, dtype: tl.constexpr,
    BITS: tl.constexpr, TABLES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The weights of some planes of a block but for their scales, [BLOCK_N, 32 * planes]."""
    pairs = pairs_of(words, first, planes, BITS)
    if TABLES:
        values = table_values(pairs, tables, dtype)
    else:
        values = integer_values(pairs, zeros, dtype, BITS, PACKED)
    return values


settle_keys(
    first_word_row,
    group_addresses,
    scales_of,
    pairs_of,
    _halves,
    _add_pairs,
    integer_values,
    table_values,
    table_rows,
    values_of,
)
