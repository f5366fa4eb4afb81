"""What experts make of their tokens, by tiles on the tensor cores.

A program computes one tile of the output for one block of an expert's pairs (see sort.py), over all of K. An
element's value depends only on its token and its expert, by the same instructions in the same order along K
whatever else is in the step, and a token's experts are added up in the order in which it chose them: results
do not depend on the order of the pairs, and nothing is added atomically.

The tensor memory accelerator copies tiles of weights to shared memory. Tokens of the first product lie
scattered, and are loaded through pointers; the second one's input is in the order of the pairs. MXFP4 weights
become numbers of the tokens' format in registers, and are the products' first operand, which may be there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.experts.parts import GROUP_BYTES, ExpertMatrices, Gating, gated, mxfp4_values
from engine.kernels.experts.sort import SortedPairs
from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.tiled import TileConfig
from engine.kernels.tensor_cores import settled

_GROUP_M = 8


@triton.jit
def tile_place(tiles_n, num_blocks, GROUP_M: tl.constexpr):
    """(block of pairs, tile of output). Programs that run together cover a patch, and so share operands in
    L2."""
    group_size = GROUP_M * tiles_n
    group = tl.program_id(0) // group_size
    height = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    place = tl.program_id(0) % group_size
    return group * GROUP_M + place % height, place // height


@triton.jit
def _load_weights(
    w_desc, scales_ptr, first, block, dtype: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Rows from `first` on of the matrices of all experts, and block number `block` of K: [BLOCK_N, BLOCK_K].
    # Rows past a matrix are the next one's, and past all matrices anything; they are not stored.
    if scales_ptr is None:
        weights = w_desc.load([first, block * BLOCK_K])
    else:
        BYTES: tl.constexpr = BLOCK_K // 2
        GROUPS: tl.constexpr = BYTES // GROUP_BYTES
        ALL_GROUPS: tl.constexpr = K // (2 * GROUP_BYTES)
        packed = w_desc.load([first, block * BYTES])
        rows = tl.minimum(first + tl.arange(0, BLOCK_N), ROWS - 1).to(tl.int64)
        groups = block * GROUPS + tl.arange(0, GROUPS)
        addresses = scales_ptr + rows[:, None] * ALL_GROUPS + groups[None, :]
        exponents = tl.load(addresses, mask=groups[None, :] < ALL_GROUPS, other=0)
        weights = mxfp4_values(packed, exponents, BLOCK_N, BYTES).to(dtype)
    return weights


@triton.jit
def _add_product(x, w, acc, TRANSPOSED: tl.constexpr):
    # acc + x [BLOCK_M, BLOCK_K] times w [BLOCK_N, BLOCK_K], [BLOCK_M, BLOCK_N] or its transpose.
    if TRANSPOSED:
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    else:
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Sums that begin, [BLOCK_M, BLOCK_N] or their transpose."""
    if TRANSPOSED:
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return sums


@triton.jit
def _finish_sum(acc, bias_ptr, rows, mask, TRANSPOSED: tl.constexpr):
    # [BLOCK_M, BLOCK_N]; rows [BLOCK_N] of the bias.
    if TRANSPOSED:
        acc = acc.T
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_blocks"])
def gate_up_tiles_kernel(
    x_ptr,  # [T, K]
    w_desc,  # [E * 2 * N, K], or K / 2 bytes; blocks of [BLOCK_N, BLOCK_K]
    scales_ptr,  # [E, 2 * N, K / 32] or None
    bias_ptr,  # [E, 2 * N] or None
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, num_blocks]
    out_ptr,  # [P, N] in the order of the pairs
    num_blocks,
    X_STRIDE: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    block, tile = tile_place((N + BLOCK_N - 1) // BLOCK_N, num_blocks, GROUP_M)
    expert = tl.load(blocks_ptr + block)
    if expert >= 0:
        places = tl.load(blocks_ptr + num_blocks + block) + tl.arange(0, BLOCK_M)
        held = places < tl.load(blocks_ptr + 2 * num_blocks + block)
        tokens = tl.load(pairs_ptr + places, mask=held, other=0) // TOP_K
        # Only rows that are known to be aligned are copied to shared memory some stages ahead.
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * X_STRIDE
        first = expert * (2 * N) + tile * BLOCK_N
        gate = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        up = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        for k in range((K + BLOCK_K - 1) // BLOCK_K):
            columns = k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            if K % BLOCK_K == 0:
                x = tl.load(x_rows + columns)
            else:
                x = tl.load(x_rows + columns, mask=columns < K, other=0.0)
            w = _load_weights(w_desc, scales_ptr, first, k, dtype, E * 2 * N, K, BLOCK_N, BLOCK_K)
            gate = _add_product(x, w, gate, TRANSPOSED)
            if scales_ptr is not None:
                gate = settled(gate)
            w = _load_weights(w_desc, scales_ptr, first + N, k, dtype, E * 2 * N, K, BLOCK_N, BLOCK_K)
            up = _add_product(x, w, up, TRANSPOSED)
            if scales_ptr is not None:
                up = settled(up)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * (2 * N) + channels
        gate = _finish_sum(gate, bias_ptr, rows, channels < N, TRANSPOSED)
        up = _finish_sum(up, bias_ptr, rows + N, channels < N, TRANSPOSED)
        result = gated(gate, up, KIND, ALPHA, LIMIT)
        addresses = out_ptr + places.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(addresses, result.to(dtype), mask=held[:, None] & (channels < N)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def down_tiles_kernel(
    x_desc,  # [P, K] in the order of the pairs, blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # [E * N, K], or K / 2 bytes; blocks of [BLOCK_N, BLOCK_K]
    scales_ptr,  # [E, N, K / 32] or None
    bias_ptr,  # [E, N] or None
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, num_blocks]
    out_ptr,  # [P, N], each pair in its own place
    num_blocks,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    block, tile = tile_place((N + BLOCK_N - 1) // BLOCK_N, num_blocks, GROUP_M)
    expert = tl.load(blocks_ptr + block)
    if expert >= 0:
        begin = tl.load(blocks_ptr + num_blocks + block)
        places = begin + tl.arange(0, BLOCK_M)
        held = places < tl.load(blocks_ptr + 2 * num_blocks + block)
        acc = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        first = expert * N + tile * BLOCK_N
        for k in range((K + BLOCK_K - 1) // BLOCK_K):
            x = x_desc.load([begin, k * BLOCK_K])  # rows past the block are other pairs', and are not stored
            w = _load_weights(w_desc, scales_ptr, first, k, dtype, E * N, K, BLOCK_N, BLOCK_K)
            acc = _add_product(x, w, acc, TRANSPOSED)
            if scales_ptr is not None:
                acc = settled(acc)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * N + channels
        acc = _finish_sum(acc, bias_ptr, rows, channels < N, TRANSPOSED)
        pairs = tl.load(pairs_ptr + places, mask=held, other=0)
        addresses = out_ptr + pairs.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(addresses, acc.to(dtype), mask=held[:, None] & (channels < N)[None, :])


@triton.jit
def combine_kernel(
    made_ptr,  # [T * TOP_K, N]
    shares_ptr,  # fp32 [T, TOP_K]
    out_ptr,  # [T, N]
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program adds up BLOCK channels of what one token's experts made, in the order of its experts."""
    programs: tl.constexpr = (N + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // programs).to(tl.int64)
    channels = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(OVERLAP)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        made = tl.load(made_ptr + pair * N + channels, mask=channels < N, other=0.0).to(tl.float32)
        total += tl.load(shares_ptr + pair) * made
    tl.store(out_ptr + token * N + channels, total.to(out_ptr.dtype.element_ty), mask=channels < N)


settle_keys(tile_place, _load_weights, _add_product, zeros, _finish_sum)


def apply_by_tiles(
    x: torch.Tensor,
    shares: torch.Tensor,
    pairs: SortedPairs,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    gating: Gating,
    *,
    gate_up_tile: TileConfig,
    down_tile: TileConfig,
) -> torch.Tensor:
    """The weighted sum of what the tokens' experts make of them.

    Args:
        x, shares, gate_up, down, gating: as of `apply_experts`. H and I are aligned to 16 bytes.
        pairs: the step's, sorted for tiles of as many tokens as both configs have.
        gate_up_tile, down_tile: `block_n` channels of a tile, of gate and of up each; `programs` and
            `overlap` are not used.

    Returns:
        [T, H] in x's dtype.
    """
    assert pairs.block_m == gate_up_tile.block_m == down_tile.block_m
    num_tokens, top_k = shares.shape
    hidden, inner = x.shape[1], down.in_features
    num_pairs = num_tokens * top_k
    activated = x.new_empty(num_pairs, inner)
    gate_up_tiles_kernel[(pairs.max_blocks * triton.cdiv(inner, gate_up_tile.block_n),)](
        x,
        _descriptor(gate_up, gate_up_tile),
        gate_up.scales,
        gate_up.bias,
        pairs.pairs,
        pairs.blocks,
        activated,
        pairs.max_blocks,
        X_STRIDE=x.stride(0),
        E=gate_up.weight.shape[0],
        TOP_K=top_k,
        N=inner,
        K=hidden,
        KIND=gating.kind,
        ALPHA=gating.alpha,
        LIMIT=gating.limit,
        **tile_options(gate_up_tile),
    )
    made = x.new_empty(num_pairs, hidden)
    rows = [down_tile.block_m, down_tile.block_k]
    down_tiles_kernel[(pairs.max_blocks * triton.cdiv(hidden, down_tile.block_n),)](
        TensorDescriptor(activated, [num_pairs, inner], [inner, 1], rows),
        _descriptor(down, down_tile),
        down.scales,
        down.bias,
        pairs.pairs,
        pairs.blocks,
        made,
        pairs.max_blocks,
        E=down.weight.shape[0],
        N=hidden,
        K=inner,
        **tile_options(down_tile),
    )
    out = x.new_empty(num_tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    combine_kernel[(num_tokens * triton.cdiv(hidden, block),)](
        made, shares, out, TOP_K=top_k, N=hidden, BLOCK=block, num_warps=4, **overlap_options()
    )
    return out


def _descriptor(matrices: ExpertMatrices, config: TileConfig) -> TensorDescriptor:
    """Of all experts' matrices, one below the other."""
    num_experts, n, stored = matrices.weight.shape
    block_k = config.block_k if matrices.scales is None else config.block_k // 2
    assert matrices.weight.is_contiguous()
    weight = matrices.weight.view(num_experts * n, stored)
    return TensorDescriptor(weight, [num_experts * n, stored], [stored, 1], [config.block_n, block_k])


def tile_options(config: TileConfig) -> dict[str, int | bool]:
    """What a kernel of tiles is launched with."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": _GROUP_M,
        "TRANSPOSED": config.transposed,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **overlap_options(),
    }
