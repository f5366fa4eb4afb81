"""What experts with e4m3 weights make of their tokens, by tiles on the tensor cores.

As in experts/grouped.py a program computes one tile of the output for one block of an expert's pairs. The
inputs of both products are quantized: tokens once, before they are spread over experts, and what gate and up
make, pair by pair. Sums are on two levels, see tiled.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.experts.grouped import combine_kernel, tile_options, tile_place, zeros
from engine.kernels.experts.parts import Gating, gated
from engine.kernels.experts.sort import SortedPairs, sort_pairs
from engine.kernels.fp8.quantize import quantize
from engine.kernels.launch import overlap_options, settle_keys, wait_for_previous
from engine.kernels.linear.tiled import TileConfig

# (tile of the first product, tile of the second), by tokens of a tile.
TILES = {
    16: (
        TileConfig(16, 64, 128, num_warps=4, num_stages=4, transposed=True),
        TileConfig(16, 64, 128, num_warps=4, num_stages=5, transposed=True),
    ),
    32: (
        TileConfig(32, 64, 128, num_warps=4, num_stages=4, transposed=True),
        TileConfig(32, 64, 128, num_warps=4, num_stages=5, transposed=True),
    ),
    64: (
        TileConfig(64, 128, 128, num_warps=8, num_stages=3),
        TileConfig(64, 128, 128, num_warps=4, num_stages=4),
    ),
    128: (
        TileConfig(128, 64, 128, num_warps=8, num_stages=4),
        TileConfig(128, 128, 128, num_warps=8, num_stages=4),
    ),
}
# With one tile for all numbers of tokens, a token's result is the same instructions' in every step.
_INVARIANT_BLOCK_M = 64


@dataclass(frozen=True, slots=True)
class Fp8ExpertMatrices:
    """A matrix of each expert.

    Attributes:
        codes: float8_e4m3fn [E, N, K], contiguous; rows are aligned to 16 bytes.
        scales: fp32 [E, N], or with a block [E, N / block[0], ceil(K / block[1])].
        block: outputs and inputs that share a scale; None for a scale an output.
        input_scale: fp32 [1], by which all inputs are quantized; None where each token has its own, or
            each of its groups of block[1].
        bias: [E, N].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int] | None = None
    input_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def input_group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[2] if self.block is None else self.block[1]


@triton.jit
def _add_scaled(acc, x, w, x_scales, w_scale, BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr):
    # acc + the product of x [BLOCK_M, BLOCK_K] and w [BLOCK_N, BLOCK_K], with the scales of blocks.
    product = tl.dot(w, x.T) if TRANSPOSED else tl.dot(x, w.T)
    if BLOCKS:
        scales = x_scales * w_scale
        product *= scales[None, :] if TRANSPOSED else scales[:, None]
    return acc + product


@triton.jit
def _finish_scaled(
    acc, x_scales_ptr, w_scales_ptr, bias_ptr, tokens, rows, mask,
    BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N]; rows [BLOCK_N] of the scales and the bias.
    if TRANSPOSED:
        acc = acc.T
    if not BLOCKS:
        acc *= tl.load(x_scales_ptr + tokens)[:, None]
        acc *= tl.load(w_scales_ptr + rows, mask=mask, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def fp8_gate_up_kernel(
    x_ptr,  # e4m3 [T, K]
    x_scales_ptr,  # fp32 [T], or [ceil(K / INPUTS), T]
    w_desc,  # e4m3 [E * 2 * N, K], blocks of [BLOCK_N, BLOCK_K]
    w_scales_ptr,  # fp32 [E, 2 * N], or [E, 2 * N / OUTPUTS, ceil(K / INPUTS)]
    bias_ptr,  # [E, 2 * N] or None
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, num_blocks]
    out_ptr,  # [P, N] in the order of the pairs
    num_tokens,
    num_blocks,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of a block of weights; 0 for a scale an output
    INPUTS: tl.constexpr,
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
    BLOCKS: tl.constexpr = OUTPUTS > 0
    GROUPS: tl.constexpr = (K + INPUTS - 1) // INPUTS
    wait_for_previous(OVERLAP)
    block, tile = tile_place((N + BLOCK_N - 1) // BLOCK_N, num_blocks, GROUP_M)
    expert = tl.load(blocks_ptr + block)
    if expert >= 0:
        places = tl.load(blocks_ptr + num_blocks + block) + tl.arange(0, BLOCK_M)
        held = places < tl.load(blocks_ptr + 2 * num_blocks + block)
        tokens = tl.load(pairs_ptr + places, mask=held, other=0) // TOP_K
        # Only rows that are known to be aligned are copied to shared memory some stages ahead.
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * K
        first = expert * (2 * N) + tile * BLOCK_N
        gate = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        up = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        for k in range((K + BLOCK_K - 1) // BLOCK_K):
            columns = k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            if K % BLOCK_K == 0:
                x = tl.load(x_rows + columns)
            else:
                x = tl.load(x_rows + columns, mask=columns < K, other=0.0)
            x_scales, gate_scale, up_scale = 1.0, 1.0, 1.0
            if BLOCKS:
                group = k * BLOCK_K // INPUTS
                x_scales = tl.load(x_scales_ptr + group * num_tokens + tokens)
                gate_scale = tl.load(w_scales_ptr + first // OUTPUTS * GROUPS + group)
                up_scale = tl.load(w_scales_ptr + (first + N) // OUTPUTS * GROUPS + group)
            w = w_desc.load([first, k * BLOCK_K])
            gate = _add_scaled(gate, x, w, x_scales, gate_scale, BLOCKS, TRANSPOSED)
            w = w_desc.load([first + N, k * BLOCK_K])
            up = _add_scaled(up, x, w, x_scales, up_scale, BLOCKS, TRANSPOSED)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * (2 * N) + channels
        # fmt: off
        gate = _finish_scaled(
            gate, x_scales_ptr, w_scales_ptr, bias_ptr, tokens, rows, channels < N, BLOCKS, TRANSPOSED
        )
        up = _finish_scaled(
            up, x_scales_ptr, w_scales_ptr, bias_ptr, tokens, rows + N, channels < N, BLOCKS, TRANSPOSED
        )
        # fmt: on
        result = gated(gate, up, KIND, ALPHA, LIMIT)
        addresses = out_ptr + places.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(addresses, result.to(out_ptr.dtype.element_ty), mask=held[:, None] & (channels < N)[None, :])


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def fp8_down_kernel(
    x_desc,  # e4m3 [P, K] in the order of the pairs, blocks of [BLOCK_M, BLOCK_K]
    x_scales_ptr,  # fp32 [P], or [ceil(K / INPUTS), P]
    w_desc,  # e4m3 [E * N, K], blocks of [BLOCK_N, BLOCK_K]
    w_scales_ptr,  # fp32 [E, N], or [E, N / OUTPUTS, ceil(K / INPUTS)]
    bias_ptr,  # [E, N] or None
    pairs_ptr,  # int32 [P]
    blocks_ptr,  # int32 [3, num_blocks]
    out_ptr,  # [P, N], each pair in its own place
    num_pairs,
    num_blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of a block of weights; 0 for a scale an output
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCKS: tl.constexpr = OUTPUTS > 0
    GROUPS: tl.constexpr = (K + INPUTS - 1) // INPUTS
    wait_for_previous(OVERLAP)
    block, tile = tile_place((N + BLOCK_N - 1) // BLOCK_N, num_blocks, GROUP_M)
    expert = tl.load(blocks_ptr + block)
    if expert >= 0:
        begin = tl.load(blocks_ptr + num_blocks + block)
        places = begin + tl.arange(0, BLOCK_M)
        held = places < tl.load(blocks_ptr + 2 * num_blocks + block)
        own = tl.minimum(places, num_pairs - 1)
        acc = zeros(BLOCK_M, BLOCK_N, TRANSPOSED)
        first = expert * N + tile * BLOCK_N
        for k in range((K + BLOCK_K - 1) // BLOCK_K):
            x = x_desc.load([begin, k * BLOCK_K])  # rows past the block are other pairs', and are not stored
            x_scales, w_scale = 1.0, 1.0
            if BLOCKS:
                group = k * BLOCK_K // INPUTS
                x_scales = tl.load(x_scales_ptr + group * num_pairs + own)
                w_scale = tl.load(w_scales_ptr + first // OUTPUTS * GROUPS + group)
            w = w_desc.load([first, k * BLOCK_K])
            acc = _add_scaled(acc, x, w, x_scales, w_scale, BLOCKS, TRANSPOSED)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * N + channels
        # fmt: off
        acc = _finish_scaled(
            acc, x_scales_ptr, w_scales_ptr, bias_ptr, own, rows, channels < N, BLOCKS, TRANSPOSED
        )
        # fmt: on
        pairs = tl.load(pairs_ptr + places, mask=held, other=0)
        addresses = out_ptr + pairs.to(tl.int64)[:, None] * N + channels[None, :]
        tl.store(addresses, acc.to(out_ptr.dtype.element_ty), mask=held[:, None] & (channels < N)[None, :])


settle_keys(_add_scaled, _finish_scaled)


def choose_fp8_tiles(
    num_pairs: int, num_experts: int, block: tuple[int, int] | None, *, deterministic: bool
) -> tuple[TileConfig, TileConfig]:
    """The tiles of the two products: as many tokens as an expert has on average, or more; of blocks no more
    than one."""
    most = next((most for most in TILES if num_pairs <= most * num_experts), max(TILES))
    tiles = TILES[_INVARIANT_BLOCK_M if deterministic else most]
    if block is None:
        return tiles
    first, second = (
        replace(tile, block_n=min(tile.block_n, block[0]), block_k=min(tile.block_k, block[1]))
        for tile in tiles
    )
    return first, second


def apply_fp8_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: Fp8ExpertMatrices,
    down: Fp8ExpertMatrices,
    gating: Gating,
    *,
    deterministic: bool = False,
    tiles: tuple[TileConfig, TileConfig] | None = None,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it; experts/naive.py defines it, of inputs that
    are rounded as the matrices say.

    Args:
        x: [T, H], last dimension contiguous.
        experts: [T, k] int32.
        shares: what each expert's result is multiplied with, [T, k] fp32.
        gate_up: [E, 2 * I, H], rows of gate before those of up.
        down: [E, H, I].
        deterministic: have each token's result bitwise the same whatever else is in the step.
        tiles: to choose between in benchmarks; by default `choose_fp8_tiles`.

    Returns:
        [T, H] in x's dtype.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    num_tokens, top_k = experts.shape
    num_experts, hidden, inner = down.codes.shape
    num_pairs = num_tokens * top_k
    if tiles is None:
        tiles = choose_fp8_tiles(num_pairs, num_experts, gate_up.block, deterministic=deterministic)
    gate_up_tile, down_tile = tiles
    pairs = sort_pairs(experts, num_experts, gate_up_tile.block_m)
    codes, scales = quantize(x, gate_up.input_group, gate_up.input_scale)
    activated = x.new_empty(num_pairs, inner)
    fp8_gate_up_kernel[(pairs.max_blocks * triton.cdiv(inner, gate_up_tile.block_n),)](
        codes,
        scales,
        _descriptor(gate_up, gate_up_tile),
        gate_up.scales,
        gate_up.bias,
        pairs.pairs,
        pairs.blocks,
        activated,
        num_tokens,
        pairs.max_blocks,
        TOP_K=top_k,
        N=inner,
        K=hidden,
        KIND=gating.kind,
        ALPHA=gating.alpha,
        LIMIT=gating.limit,
        **_options(gate_up, gate_up_tile),
    )
    made = _down(activated, pairs, down, down_tile)
    out = x.new_empty(num_tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    combine_kernel[(num_tokens * triton.cdiv(hidden, block),)](
        made, shares, out, TOP_K=top_k, N=hidden, BLOCK=block, num_warps=4, **overlap_options()
    )
    return out


def _down(
    activated: torch.Tensor, pairs: SortedPairs, down: Fp8ExpertMatrices, tile: TileConfig
) -> torch.Tensor:
    """activated [P, I] in the order of the pairs -> [P, H], each pair in its own place."""
    num_pairs, inner = activated.shape
    hidden = down.codes.shape[1]
    codes, scales = quantize(activated, down.input_group, down.input_scale)
    made = activated.new_empty(num_pairs, hidden)
    fp8_down_kernel[(pairs.max_blocks * triton.cdiv(hidden, tile.block_n),)](
        TensorDescriptor(codes, [num_pairs, inner], [inner, 1], [tile.block_m, tile.block_k]),
        scales,
        _descriptor(down, tile),
        down.scales,
        down.bias,
        pairs.pairs,
        pairs.blocks,
        made,
        num_pairs,
        pairs.max_blocks,
        N=hidden,
        K=inner,
        **_options(down, tile),
    )
    return made


def _descriptor(matrices: Fp8ExpertMatrices, tile: TileConfig) -> TensorDescriptor:
    """Of all experts' matrices, one below the other."""
    num_experts, n, k = matrices.codes.shape
    assert matrices.codes.is_contiguous()
    codes = matrices.codes.view(num_experts * n, k)
    return TensorDescriptor(codes, [num_experts * n, k], [k, 1], [tile.block_n, tile.block_k])


def _options(matrices: Fp8ExpertMatrices, tile: TileConfig) -> dict[str, int | bool]:
    outputs, inputs = matrices.block or (0, tile.block_k)
    assert inputs % tile.block_k == 0
    assert outputs % tile.block_n == 0
    return {"OUTPUTS": outputs, "INPUTS": inputs, **tile_options(tile)}
