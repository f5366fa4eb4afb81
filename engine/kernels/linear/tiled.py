"""Products of any number of tokens with a weight matrix, by tiles on the tensor cores.

The tensor memory accelerator copies tiles of both operands to shared memory some stages ahead of the tensor
cores, which read them there. Work is shared among programs in one of two ways.

Whole tiles: a program computes one tile of the output over all of K. An element's value depends only on its
row of x and of w: always the same instructions in the same order along K, whatever else is in the batch.

Shares (after Stream-K, arXiv:2301.03598): the blocks of K of all output tiles, one tile after the other, are
one line that is cut into equal parts, one for each program, so that every multiprocessor has the same to do
however many tiles there are. The parts of a tile that was cut are added up by the program that finishes last,
always in the order of K: results repeat, though they depend on how many programs there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import ORDINARY, overlap_options, prefetch_lines, settle_keys, wait_for_previous


@dataclass(frozen=True, slots=True)
class TileConfig:
    """The tile of a program and how it is worked on.

    Attributes:
        block_m, block_n: tokens and output features of a tile.
        block_k: features multiplied at a time.
        num_warps: 4 or 8, each four taking 64 rows of the first operand.
        num_stages: tiles of operands in flight.
        transposed: whether the weights are the first operand, whose rows come in steps of 64; the tokens are
            then the second, and may be as few as 16.
        programs: 0 for whole tiles; otherwise this many take equal shares.
        overlap: have the first weights on their way to the L2 cache while the kernel before still runs; see
            engine/kernels/launch.py.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    transposed: bool = False
    programs: int = 0
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class ShareWorkspace:
    """Where programs leave their parts of the tiles that they share.

    The launches that use one must be ordered, as those of one stream are.

    Attributes:
        partials: fp32, two tiles for each program.
        arrivals: int32, one for each tile: programs that have left their part. Zero between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @staticmethod
    def make(device: torch.device, *, tile_elements: int, tiles: int) -> ShareWorkspace:
        """For launches of at most so many tiles, and at most programs * block_m * block_n elements."""
        partials = torch.empty(2 * tile_elements, dtype=torch.float32, device=device)
        return ShareWorkspace(partials, torch.zeros(tiles, dtype=torch.int32, device=device))

    def require(self, tiles: int, tile_elements: int) -> None:
        """Asserts that there is room for a launch of so many tiles, and programs * block_m * block_n
        elements."""
        assert tiles <= self.arrivals.numel()
        assert 2 * tile_elements <= self.partials.numel()


@triton.jit
def prefetch_weights(
    w_ptr, first_n, begin, end, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr
):
    """Blocks [begin, end) of K, of the rows from first_n on."""
    # Elements of a cache line, or of as much of one as a block has.
    LINE: tl.constexpr = min(BLOCK_K, 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8))
    if OVERLAP:
        rows = (first_n + tl.arange(0, BLOCK_N))[:, None]
        for block in range(begin, end):
            columns = block * BLOCK_K + (tl.arange(0, BLOCK_K // LINE) * LINE)[None, :]
            prefetch_lines(w_ptr + rows.to(tl.int64) * k + columns, (rows < n) & (columns < k), OVERLAP)


@triton.jit
def _multiply(
    x_desc,
    w_desc,
    first_m,
    first_n,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    # Blocks [begin, end) of K, of the tile at (first_m, first_n). Outside the matrices, zeros are read.
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(begin, end):
        x = x_desc.load([first_m, block * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        w = w_desc.load([first_n, block * BLOCK_K])  # [BLOCK_N, BLOCK_K]
        if TRANSPOSED:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _store(
    acc,
    bias_ptr,
    out_ptr,
    first_m,
    first_n,
    m,
    n,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    tokens = first_m + tl.arange(0, BLOCK_M)
    rows = first_n + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        acc = acc.T
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :].to(tl.float32)
    addresses = out_ptr + tokens[:, None].to(tl.int64) * out_stride + rows[None, :]
    tl.store(addresses, acc.to(out_ptr.dtype.element_ty), mask=(tokens[:, None] < m) & (rows[None, :] < n))


@triton.jit
def _part_offsets(program, slot, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    # Where a program leaves its part: slot 0 of a tile that it entered midway, 1 of one that it began.
    if TRANSPOSED:
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    else:
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return (program * 2 + slot) * (BLOCK_M * BLOCK_N) + within


@triton.jit
def whole_tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first token and the first row of weights of this program's tile. Programs that run together cover a
    patch, GROUP_M tiles of tokens high, and so share operands in L2."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // group_size
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    place = tl.program_id(0) % group_size
    return (group * GROUP_M + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def gather_parts(
    acc, partials_ptr, arrivals_ptr, program, tile, begin, end, blocks, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, and whether they are whole, for a program that has added up the blocks [begin, end)
    of K. If that is not all of them it leaves its part, and who comes last adds them up, always in the same
    order.

    Args:
        acc: [BLOCK_M, BLOCK_N] or its transpose.
        partials_ptr: of acc's type, [programs, 2, tile].
        arrivals_ptr: int32 [tiles], all zero, and zero again afterwards.
        blocks: of K, in a tile.
        share: blocks of each program.
    """
    finished = end - begin == blocks
    if not finished:
        slot = (begin == 0).to(tl.int32)
        offsets = _part_offsets(program, slot, BLOCK_M, BLOCK_N, TRANSPOSED)
        tl.store(partials_ptr + offsets, acc)
        # All threads' parts are written before one thread says so.
        tl.debug_barrier()
        first = tile * blocks // share
        last = ((tile + 1) * blocks - 1) // share
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == last - first:
            # The program that began the tile left its part in slot 1; the others entered midway.
            # Past L1, which other multiprocessors do not write to.
            offsets = _part_offsets(first, 1, BLOCK_M, BLOCK_N, TRANSPOSED)
            acc = tl.load(partials_ptr + offsets, cache_modifier=".cg")
            for other in range(first + 1, last + 1):
                offsets = _part_offsets(other, 0, BLOCK_M, BLOCK_N, TRANSPOSED)
                acc += tl.load(partials_ptr + offsets, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
            finished = True
    return acc, finished


@triton.jit(do_not_specialize=["m"])
def whole_tiles_kernel(
    x_desc,  # [M, K], blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K], blocks of [BLOCK_N, BLOCK_K]
    w_ptr,  # the same [N, K]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    m,
    n,
    k,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PREFETCHED: tl.constexpr,  # blocks of K
    OVERLAP: tl.constexpr,
):
    first_m, first_n = whole_tile(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    blocks = tl.cdiv(k, BLOCK_K)
    prefetched = tl.minimum(blocks, PREFETCHED)
    prefetch_weights(w_ptr, first_n, 0, prefetched, n, k, BLOCK_N, BLOCK_K, OVERLAP)
    wait_for_previous(OVERLAP)
    acc = _multiply(x_desc, w_desc, first_m, first_n, 0, blocks, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED)
    _store(acc, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride, BLOCK_M, BLOCK_N, TRANSPOSED, HAS_BIAS)


@triton.jit(do_not_specialize=["m"])
def shares_kernel(
    x_desc,  # [M, K], blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K], blocks of [BLOCK_N, BLOCK_K]
    w_ptr,  # the same [N, K]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    partials_ptr,  # fp32 [programs, 2, tile]
    arrivals_ptr,  # int32 [tiles], all zero, and zero again afterwards
    m,
    n,
    k,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PREFETCHED: tl.constexpr,  # blocks of K
    OVERLAP: tl.constexpr,
):
    blocks = tl.cdiv(k, BLOCK_K)  # of K, in a tile
    tiles_m = tl.cdiv(m, BLOCK_M)
    total = tiles_m * tl.cdiv(n, BLOCK_N) * blocks
    share = tl.cdiv(total, tl.num_programs(0))
    program = tl.program_id(0)
    position = program * share
    stop = tl.minimum(position + share, total)
    begin = position % blocks
    prefetched = tl.minimum(begin + tl.minimum(stop - position, PREFETCHED), blocks)
    first_n = position // blocks // tiles_m * BLOCK_N
    prefetch_weights(w_ptr, first_n, begin, prefetched, n, k, BLOCK_N, BLOCK_K, OVERLAP)
    wait_for_previous(OVERLAP)
    while position < stop:
        tile = position // blocks
        begin = position - tile * blocks
        end = tl.minimum(blocks, begin + stop - position)
        position += end - begin
        # The tiles of tokens of the same weights are neighbours, so that the weights are read once.
        first_m = tile % tiles_m * BLOCK_M
        first_n = tile // tiles_m * BLOCK_N
        acc = _multiply(x_desc, w_desc, first_m, first_n, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED)
        acc, finished = gather_parts(
            acc, partials_ptr, arrivals_ptr, program, tile, begin, end, blocks, share,
            BLOCK_M, BLOCK_N, TRANSPOSED,
        )  # fmt: skip
        if finished:
            _store(
                acc, bias_ptr, out_ptr, first_m, first_n, m, n, out_stride,
                BLOCK_M, BLOCK_N, TRANSPOSED, HAS_BIAS,
            )  # fmt: skip


settle_keys(prefetch_lines, prefetch_weights, whole_tile, _part_offsets, gather_parts)


def tiled_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: TileConfig,
    workspace: ShareWorkspace | None = None,
) -> torch.Tensor:
    """x @ w.T + bias with the given tiles.

    Args:
        x: [M, K], last dimension contiguous, rows and start aligned to 16 bytes.
        w: [N, K], contiguous; K aligned to 16 bytes.
        bias: [N].
        workspace: for a config with `programs`, large enough for it.

    Returns:
        [M, N] in x's dtype.
    """
    (m, k), n = x.shape, w.shape[0]
    assert w.shape[1] == k, f"x has {k} features, the weights {w.shape[1]}"
    assert w.is_contiguous()
    out = x.new_empty(m, n)
    x_desc = TensorDescriptor(x, [m, k], list(x.stride()), [config.block_m, config.block_k])
    w_desc = TensorDescriptor(w, [n, k], [k, 1], [config.block_n, config.block_k])
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    shape = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TRANSPOSED": config.transposed,
        "HAS_BIAS": bias is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # As many as the loop will have in flight.
        "PREFETCHED": config.num_stages,
        **(overlap_options() if config.overlap else ORDINARY),
    }
    if not config.programs:
        whole_tiles_kernel[(tiles,)](x_desc, w_desc, w, bias, out, m, n, k, out.stride(0), GROUP_M=8, **shape)
        return out
    assert workspace is not None
    workspace.require(tiles, config.programs * config.block_m * config.block_n)
    shares_kernel[(config.programs,)](
        x_desc, w_desc, w, bias, out, workspace.partials, workspace.arrivals, m, n, k, out.stride(0), **shape
    )
    return out


# From most work per byte to least. An element's value does not depend on which of them is used: in all, the
# tensor cores add the same products of 16 along K, in the same order, to the same accumulator. Without
# 128 x 256, whose products Triton 3.6's assembler makes wait for one another.
_INVARIANT_TILES = (
    TileConfig(256, 128, 64, num_warps=8, num_stages=4),
    TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    TileConfig(128, 64, 64, num_warps=8, num_stages=5),
    TileConfig(64, 128, 128, num_warps=4, num_stages=4),
    TileConfig(64, 64, 128, num_warps=4, num_stages=5),
    TileConfig(64, 32, 128, num_warps=4, num_stages=5),
    TileConfig(64, 16, 128, num_warps=4, num_stages=6),
)
_FP32_TILE = TileConfig(64, 32, 32, num_warps=8, num_stages=3)
# Enough to give most of the 132 multiprocessors of an H100 or H200 one; halving them would help no more.
_ENOUGH_TILES = 96


def invariant_config(m: int, n: int, dtype: torch.dtype) -> TileConfig:
    """The largest tiles of which there are enough; those of 64 tokens where there are no more tokens."""
    if dtype == torch.float32:
        return _FP32_TILE
    for config in _INVARIANT_TILES:
        if m <= 64 < config.block_m:
            continue
        if triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) >= _ENOUGH_TILES:
            break
    return config


def invariant_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias, each row bitwise the same however many others there are and whichever it is.

    Arguments and result as of `tiled_linear`.
    """
    return tiled_linear(x, w, bias, config=invariant_config(x.shape[0], w.shape[0], x.dtype))
