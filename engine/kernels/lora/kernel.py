"""Shrink and expand: a token's input is brought to its adapter's rank, and from there to the layer's outputs.

Tokens are sorted by adapter on the host and cut into tiles of one adapter each. A program has a tile, so it
reads one adapter's matrix; tiles without an adapter end at once, so that a captured graph holds any step.
The shrink's sum
over K is split among programs, whose shares the expand adds up: nothing is added atomically, and nothing has
to be zero before. The expand adds to the layer's product in place. No length is a constant of a kernel.

For one token the shrink's rows are further programs of the layer's own product, which reads the same input,
and the expand loads its matrix while that product still runs. So an adapter costs one overlapping launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.matrix_vector import RowsConfig

_MAX_PARTS = 3
# Tokens up to which tiles are small and the sum over K is split.
_FEW_TOKENS = 1024
_FEW_BLOCK_M, _MANY_BLOCK_M = 32, 64
_MANY_OUTPUTS = 4096


@dataclass(frozen=True, slots=True)
class AdapterTiles:
    """The tokens of a step sorted by adapter, in device memory.

    Attributes:
        tokens: indices of tokens, those of an adapter side by side, [T] int32.
        slot: each tile's adapter, -1 for none, [tiles] int32.
        begin, end: each tile's part of `tokens`, [tiles] int32.
        block_m: the most tokens of a tile.
    """

    tokens: torch.Tensor
    slot: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    block_m: int


def tile_tokens(num_tokens: int, *, invariant: bool = False) -> int:
    """Tokens of a tile, in a step of so many. `invariant`: the same for any number."""
    return _FEW_BLOCK_M if invariant or num_tokens <= _FEW_TOKENS else _MANY_BLOCK_M


def most_tiles(num_tokens: int, num_slots: int, block_m: int) -> int:
    """The most tiles that the tokens of a step can make."""
    return num_tokens // block_m + min(num_slots, num_tokens)


def _split_k(num_tokens: int, k: int, parts: int, *, invariant: bool) -> int:
    """Programs that share a sum over K: more where there are few tiles."""
    if invariant:
        return 4
    if num_tokens > _FEW_TOKENS:
        return 1
    wanted = 8 if num_tokens <= 64 else 4
    return max(1, min(wanted if parts > 1 else 2 * wanted, k // 256))


@triton.jit
def _tile(tile, tokens_ptr, tile_slot_ptr, tile_begin_ptr, tile_end_ptr, ranks_ptr, BLOCK_M: tl.constexpr):
    # (slot, its rank, rows in the tiles' order, their tokens, which of them there are). All of it was made
    # when the step began, so it may be read before the kernel before has ended; past the L1 cache, see
    # engine/kernels/launch.py.
    slot = tl.load(tile_slot_ptr + tile, cache_modifier=".cg")
    begin = tl.load(tile_begin_ptr + tile, cache_modifier=".cg")
    end = tl.load(tile_end_ptr + tile, cache_modifier=".cg")
    rank = tl.load(ranks_ptr + tl.maximum(slot, 0), cache_modifier=".cg")
    rows = begin + tl.arange(0, BLOCK_M)
    mask = rows < tl.where(slot >= 0, end, 0)
    tokens = tl.load(tokens_ptr + rows, mask=mask, other=0, cache_modifier=".cg").to(tl.int64)
    return slot, rank, rows, tokens, mask


@triton.jit(do_not_specialize=["num_rows"])
def shrink_kernel(
    x_ptr,  # [T, K]
    a_ptr,  # [S, PARTS, R, K]
    tokens_ptr,
    tile_slot_ptr,
    tile_begin_ptr,
    tile_end_ptr,
    ranks_ptr,  # [S]
    out_ptr,  # [SPLIT_K, T, PARTS * R] fp32, rows in the tiles' order
    num_rows,
    x_stride,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile, r_block, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, rank, rows, tokens, mask = _tile(
        tile, tokens_ptr, tile_slot_ptr, tile_begin_ptr, tile_end_ptr, ranks_ptr, BLOCK_M
    )
    wait_for_previous(OVERLAP)
    first_r = r_block * BLOCK_R
    if (slot < 0) | (first_r % R >= rank):
        return
    r = first_r + tl.arange(0, BLOCK_R)
    a_rows = a_ptr + (slot.to(tl.int64) * PARTS * R + r)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(share * BLOCK_K, K, SPLIT_K * BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < K
        x = tl.load(
            x_ptr + tokens[:, None] * x_stride + columns[None, :], mask=mask[:, None] & inside, other=0.0
        )
        a = tl.load(a_rows + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    places = (share.to(tl.int64) * num_rows + rows)[:, None] * (PARTS * R) + r[None, :]
    tl.store(out_ptr + places, acc, mask=mask[:, None])


@triton.jit
def _part_of(block, size_0, size_1, size_2, BLOCK_N: tl.constexpr):
    # Which matrix of a fused layer a block of outputs is in: (part, the part's first output, the block's
    # first in the part, outputs of the part)
    blocks_0 = tl.cdiv(size_0, BLOCK_N)
    blocks_1 = blocks_0 + tl.cdiv(size_1, BLOCK_N)
    part = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
    before = tl.where(part == 0, 0, tl.where(part == 1, blocks_0, blocks_1))
    first = tl.where(part == 0, 0, tl.where(part == 1, size_0, size_0 + size_1))
    size = tl.where(part == 0, size_0, tl.where(part == 1, size_1, size_2))
    return part, first, (block - before) * BLOCK_N, size


@triton.jit(do_not_specialize=["num_rows", "size_0", "size_1", "size_2"])
def expand_kernel(
    shrunk_ptr,  # [SPLIT_K, T, PARTS * R] fp32
    b_ptr,  # [S, N, R]
    tokens_ptr,
    tile_slot_ptr,
    tile_begin_ptr,
    tile_end_ptr,
    ranks_ptr,
    has_vectors_ptr,
    gain_ptr,  # [S, N] fp32
    offset_ptr,
    out_ptr,  # [T, N]
    num_rows,
    n,
    out_stride,
    size_0,
    size_1,
    size_2,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, rank, rows, tokens, mask = _tile(
        tile, tokens_ptr, tile_slot_ptr, tile_begin_ptr, tile_end_ptr, ranks_ptr, BLOCK_M
    )
    part, first, start, size = _part_of(block, size_0, size_1, size_2, BLOCK_N)
    inside = start + tl.arange(0, BLOCK_N)
    n_mask = inside < tl.where(slot >= 0, size, 0)
    columns = first + inside
    held = tl.maximum(slot, 0).to(tl.int64)
    b_rows = b_ptr + (held * n + columns)[:, None] * R
    r = tl.arange(0, BLOCK_R)
    b = tl.load(b_rows + r[None, :], mask=n_mask[:, None] & (r < rank)[None, :], other=0.0)
    wait_for_previous(OVERLAP)
    if slot < 0:
        return
    both = mask[:, None] & n_mask[None, :]
    addresses = out_ptr + tokens[:, None] * out_stride + columns[None, :]
    value = tl.load(addresses, mask=both, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r_begin in range(0, rank, BLOCK_R):
        r = r_begin + tl.arange(0, BLOCK_R)
        if r_begin > 0:
            b = tl.load(b_rows + r[None, :], mask=n_mask[:, None] & (r < rank)[None, :], other=0.0)
        shrunk = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for share in tl.static_range(SPLIT_K):
            places = (share * num_rows + rows).to(tl.int64)[:, None] * (PARTS * R) + part * R + r[None, :]
            shrunk += tl.load(shrunk_ptr + places, mask=mask[:, None] & (r < rank)[None, :], other=0.0)
        acc = tl.dot(shrunk.to(b.dtype), tl.trans(b), acc, input_precision="ieee")
    if tl.load(has_vectors_ptr + slot) != 0:
        value *= tl.load(gain_ptr + held * n + columns, mask=n_mask, other=0.0)[None, :]
        value += tl.load(offset_ptr + held * n + columns, mask=n_mask, other=0.0)[None, :]
    tl.store(addresses, (value + acc).to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _row_products(
    x_ptr, w_ptr, rows, n, first, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    # The products of one token with some rows, whose first numbers are there already: [BLOCK_N] fp32
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    w = first
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)[None, :]
        if k > 0:
            w = _row_block(w_ptr, rows, n, k, K, BLOCK_K)
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0, eviction_policy="evict_last")
        acc += x.to(tl.float32) * w.to(tl.float32)
    return tl.sum(acc, axis=1)


@triton.jit
def _row_block(w_ptr, rows, n, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    columns = k + tl.arange(0, BLOCK_K)[None, :]
    addresses = w_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K + columns
    if K % BLOCK_K == 0:
        return tl.load(addresses, eviction_policy="evict_first")
    return tl.load(addresses, mask=columns < K, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n"])
def matrix_vector_shrink_kernel(
    x_ptr,  # [K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    out_ptr,  # [N]
    a_ptr,  # [S, PARTS, R, K]
    slot_ptr,  # [1]
    ranks_ptr,
    shrunk_ptr,  # [PARTS * R] fp32
    n,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # PARTS * R
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # The adapter's programs come first, so that none of them is left when the product is done.
    program = tl.program_id(0)
    adapters: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    slot = tl.load(slot_ptr)
    held = tl.maximum(slot, 0)
    rank = tl.load(ranks_ptr + held)
    if program < adapters:
        matrix = a_ptr + held.to(tl.int64) * (ROWS * K)
        begin, limit = program * BLOCK_N, ROWS
        is_wanted = (slot >= 0) & (begin % R < rank)
    else:
        matrix = w_ptr
        begin, limit = (program - adapters) * BLOCK_N, n
        is_wanted = n > 0
    rows = begin + tl.arange(0, BLOCK_N)
    first = _row_block(matrix, rows, limit, 0, K, BLOCK_K)
    wait_for_previous(OVERLAP)
    if is_wanted:
        product = _row_products(x_ptr, matrix, rows, limit, first, K, BLOCK_N, BLOCK_K)
        if program < adapters:
            tl.store(shrunk_ptr + rows, product, mask=rows < ROWS)
        else:
            if HAS_BIAS:
                product += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
            tl.store(out_ptr + rows, product.to(out_ptr.dtype.element_ty), mask=rows < n)


@triton.jit(do_not_specialize=["n", "size_0", "size_1", "size_2"])
def expand_one_kernel(
    shrunk_ptr,  # [PARTS * R] fp32
    b_ptr,  # [S, N, R]
    slot_ptr,
    ranks_ptr,
    has_vectors_ptr,
    gain_ptr,
    offset_ptr,
    out_ptr,  # [N]
    n,
    size_0,
    size_1,
    size_2,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R rounded up to a power of two
    OVERLAP: tl.constexpr,
):
    part, first, start, size = _part_of(tl.program_id(0), size_0, size_1, size_2, BLOCK_N)
    inside = start + tl.arange(0, BLOCK_N)
    slot = tl.load(slot_ptr).to(tl.int64)
    mask = inside < tl.where(slot >= 0, size, 0)
    held = tl.maximum(slot, 0)
    columns = first + inside
    r = tl.arange(0, BLOCK_R)
    known = r < tl.where(slot >= 0, tl.load(ranks_ptr + held), 0)
    b = tl.load(
        b_ptr + (held * n + columns)[:, None] * R + r[None, :], mask=mask[:, None] & known[None, :], other=0.0
    )
    has_vectors = tl.load(has_vectors_ptr + held)
    wait_for_previous(OVERLAP)
    shrunk = tl.load(shrunk_ptr + part * R + r, mask=known, other=0.0)
    value = tl.load(out_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if has_vectors != 0:
        value *= tl.load(gain_ptr + held * n + columns, mask=mask, other=0.0)
        value += tl.load(offset_ptr + held * n + columns, mask=mask, other=0.0)
    value += tl.sum(b.to(tl.float32) * shrunk[None, :], axis=1)
    tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


settle_keys(_tile, _part_of, _row_block, _row_products)


def _sizes(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    assert len(sizes) <= _MAX_PARTS
    return (*sizes, *([0] * (_MAX_PARTS - len(sizes))))  # type: ignore[return-value]


def add_adapters(
    x: torch.Tensor,
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    sizes: tuple[int, ...],
    *,
    ranks: torch.Tensor,
    has_vectors: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    tiles: AdapterTiles,
    invariant: bool = False,
) -> None:
    """Adds to a layer's product [T, N], in place, what the adapters of its tokens add; see naive.py. Rows of
    `a` and columns of `b` behind a slot's rank are not read.

    Args:
        x: [T, K], last dimension contiguous.
        ranks, has_vectors: [S] int32; ranks are multiples of 16, gain and offset count where has_vectors is
            not 0.
        invariant: a token's numbers are the same in any batch.
    """
    (num_tokens, k), (_, parts, rank, _) = x.shape, a.shape
    assert x.stride(1) == out.stride(1) == 1
    split = _split_k(num_tokens, k, parts, invariant=invariant)
    block_r = 16 if rank % 32 else 32
    options = overlap_options()
    num_tiles = len(tiles.slot)
    shrunk = torch.empty(split, num_tokens, parts * rank, dtype=torch.float32, device=x.device)
    places = (tiles.tokens, tiles.slot, tiles.begin, tiles.end)
    shrink_kernel[(num_tiles, parts * rank // block_r, split)](
        x,
        a,
        *places,
        ranks,
        shrunk,
        num_tokens,
        x.stride(0),
        K=k,
        PARTS=parts,
        R=rank,
        BLOCK_M=tiles.block_m,
        BLOCK_R=block_r,
        BLOCK_K=128,
        SPLIT_K=split,
        num_warps=4,
        **options,
    )
    # A program waits for the shrink once, however many outputs it has: as many as leave none of the
    # multiprocessors without one.
    block_n = 128 if b.shape[1] >= _MANY_OUTPUTS and not invariant else 64
    expand_kernel[(num_tiles, sum(triton.cdiv(size, block_n) for size in sizes))](
        shrunk,
        b,
        *places,
        ranks,
        has_vectors,
        gain,
        offset,
        out,
        num_tokens,
        b.shape[1],
        out.stride(0),
        *_sizes(sizes),
        PARTS=parts,
        R=rank,
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        SPLIT_K=split,
        num_warps=4,
        **options,
    )


def one_token_with_adapter(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    sizes: tuple[int, ...],
    *,
    ranks: torch.Tensor,
    has_vectors: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    slot: torch.Tensor,
    config: RowsConfig,
) -> torch.Tensor:
    """x [1, K] @ w [N, K].T + bias, and what the adapter in `slot` [1] adds to it: [1, N] in x's dtype."""
    (n, k), (_, parts, rank, _) = w.shape, a.shape
    assert x.shape == (1, k)
    assert w.is_contiguous()
    out = x.new_empty(1, n)
    shrunk = torch.empty(parts * rank, dtype=torch.float32, device=x.device)
    options = overlap_options()
    programs = triton.cdiv(parts * rank, config.block_n) + triton.cdiv(n, config.block_n)
    matrix_vector_shrink_kernel[(programs,)](
        x,
        w,
        bias,
        out,
        a,
        slot,
        ranks,
        shrunk,
        n,
        K=k,
        ROWS=parts * rank,
        R=rank,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        **options,
    )
    block_r = triton.next_power_of_2(rank)
    block_n = max(16, min(64, 4096 // block_r))
    expand_one_kernel[(sum(triton.cdiv(size, block_n) for size in sizes),)](
        shrunk,
        b,
        slot,
        ranks,
        has_vectors,
        gain,
        offset,
        out,
        n,
        *_sizes(sizes),
        R=rank,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4,
        **options,
    )
    return out
