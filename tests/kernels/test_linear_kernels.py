"""The matrix products against their definition, on fresh random inputs and poisoned outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.linear import choice, matrix_vector, tiled
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.naive import naive_linear, naive_norm_linear, naive_silu_mul_linear
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig
from tests.kernels.hopper import compile_overlapping

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter computes nonsense with bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

TILES = [
    TileConfig(16, 64, 64, num_warps=4, num_stages=3, transposed=True),
    TileConfig(64, 32, 64, num_warps=4, num_stages=3),
]
# Programs that hold less than a tile, about one, and more than one; and more programs than there is work.
PROGRAMS = [2, 3, 5, 64]
LARGE_SHAPES = [(1024, 3072), (6144, 1024), (4096, 4096), (1030, 1032)]


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k] as part of a wider tensor whose other elements are NaN, w [n, k], bias [n]."""
    wide = torch.full((m, k + 16), torch.nan, dtype=dtype, device=DEVICE)
    x = wide[:, :k].copy_(torch.randn(m, k, device=DEVICE))
    w = torch.randn(n, k, device=DEVICE).mul_(k**-0.5).to(dtype)
    return x, w, torch.randn(n, device=DEVICE).to(dtype)


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, n] of NaN inside a wider tensor."""
    return torch.full((m, n + 8), torch.nan, dtype=dtype, device=DEVICE)[:, :n]


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"  # which NaN never passes
    # Nothing was written beside it.
    if not out.is_contiguous():
        beside = out.as_strided((out.shape[0], 8), out.stride(), out.storage_offset() + out.shape[1])
        assert beside.isnan().all()


def shapes(small: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return small + (LARGE_SHAPES if CUDA else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), shapes([(7, 264), (16, 512)]))
@pytest.mark.parametrize("m", [1, 3, 8, *([2, 5] if CUDA else [])])
def test_a_few_tokens_times_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, n, k, dtype)
    for config in [None, RowsConfig(4, num_warps=1), RowsConfig(1, num_warps=1, unroll=2)]:
        out = poisoned(m, n, dtype)
        matrix_vector.matrix_vector(x, w, None, out, config=config)
        assert_close(out, naive_linear(x, w))
        assert_close(matrix_vector.matrix_vector(x, w, bias, config=config), naive_linear(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), shapes([(7, 264), (16, 512)]))
@pytest.mark.parametrize("m", [1, 3, 8])
def test_norm_and_product_in_one(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, _ = operands(m, n, k, dtype)
    residual, _, _ = operands(m, n, k, dtype)
    norm_weight = torch.randn(k, device=DEVICE).to(dtype)
    expected, total = naive_norm_linear(x, residual, norm_weight, 1e-5, w)
    before = x.clone(), residual.clone()
    out, residual_out = poisoned(m, n, dtype), poisoned(m, k, dtype)
    matrix_vector.norm_linear(
        x,
        residual,
        norm_weight,
        1e-5,
        w,
        residual_out=residual_out,
        out=out,
        config=RowsConfig(2, num_warps=2),
    )
    assert_close(out, expected)
    assert torch.equal(residual_out, total)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), shapes([(7, 264), (16, 512)]))
@pytest.mark.parametrize("m", [1, 3, 8])
def test_silu_and_product_in_one(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    gate_up, _, _ = operands(m, n, 2 * k, dtype)
    _, w, _ = operands(m, n, k, dtype)
    out = poisoned(m, n, dtype)
    matrix_vector.silu_mul_linear(gate_up, w, out=out, config=RowsConfig(2, num_warps=2))
    assert_close(out, naive_silu_mul_linear(gate_up, w))


@pytest.mark.skipif(not CUDA, reason="the interpreter has one kernel at a time")
def test_overlapping_products_see_what_the_kernel_before_wrote() -> None:
    sizes = [4096, 1024, 6144, 1024]
    weights = [
        operands(1, n, k, torch.bfloat16)[1] for k, n in zip(sizes, [*sizes[1:], sizes[0]], strict=True)
    ]
    buffers = [torch.empty(2, w.shape[0], dtype=torch.bfloat16, device=DEVICE) for w in weights]
    start = torch.randn(2, sizes[0], device=DEVICE).to(torch.bfloat16)

    def chain(overlap: bool) -> torch.Tensor:
        x = start
        for step in range(40):
            config = RowsConfig(1 + step % 2, overlap=overlap)
            x = matrix_vector.matrix_vector(x, weights[step % 4], out=buffers[step % 4], config=config)
            if step % 5 == 0:
                x.mul_(2)
        return x.clone()

    expected = chain(False)
    graph = torch.cuda.CUDAGraph()
    assert torch.equal(chain(True), expected)
    with torch.cuda.graph(graph):
        result = chain(True)
    for _ in range(20):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", TILES, ids=["weights first", "tokens first"])
@pytest.mark.parametrize(("n", "k"), shapes([(70, 136), (64, 192)]))
@pytest.mark.parametrize("m", [1, 9, 17, 65])
def test_whole_tiles(m: int, n: int, k: int, config: TileConfig, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, n, k, dtype)
    out = poisoned(m, n, dtype)
    tiled.tiled_linear(x, w, None, out, config=config)
    assert_close(out, naive_linear(x, w))
    assert_close(tiled.tiled_linear(x, w, bias, config=config), naive_linear(x, w, bias))


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("config", TILES, ids=["weights first", "tokens first"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 264), (17, 70, 136), (65, 40, 200)])
def test_shared_tiles(m: int, n: int, k: int, config: TileConfig, programs: int) -> None:
    config = replace(config, programs=programs)
    dtype = torch.bfloat16 if CUDA else torch.float32
    workspace = ShareWorkspace.for_product(DEVICE, m, n, config)
    # A later product finds the workspace as usable as the first one.
    for _ in range(2):
        x, w, bias = operands(m, n, k, dtype)
        workspace.partials.fill_(torch.nan)
        out = poisoned(m, n, dtype)
        tiled.tiled_linear(x, w, bias, out, config=config, workspace=workspace)
        assert_close(out, naive_linear(x, w, bias))
        assert not workspace.arrivals.any()


@pytest.mark.parametrize("m", [1, 4, 5, 16, 17, 48, *([33, 64, 128, 192, 256] if CUDA else [])])
@pytest.mark.parametrize(("n", "k"), [(70, 264), *(LARGE_SHAPES if CUDA else [])])
def test_default_configs(m: int, n: int, k: int) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, w, bias = operands(m, n, k, dtype)
    product = choice.small_batch_linear if m <= choice.SMALL_BATCH else choice.medium_batch_linear
    assert_close(product(x, w, bias, poisoned(m, n, dtype)), naive_linear(x, w, bias))


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes")
@pytest.mark.parametrize("m", [1, 16, 64, 192, 256])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 14336), (1024, 2048)])
def test_shared_tiles_repeat_bitwise(m: int, n: int, k: int) -> None:
    x, w, _ = operands(m, n, k, torch.bfloat16)
    config = choice.medium_batch_config(m, n, k)
    workspace = ShareWorkspace.for_product(DEVICE, m, n, config)
    first = tiled.tiled_linear(x, w, config=config, workspace=workspace)
    for _ in range(20):
        assert torch.equal(first, tiled.tiled_linear(x, w, config=config, workspace=workspace))


@pytest.mark.parametrize(
    "dtype", [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])], ids=str
)
@pytest.mark.parametrize(("n", "k"), [(72, 136), *(LARGE_SHAPES if CUDA else [])])
def test_a_row_is_bitwise_the_same_in_any_batch(n: int, k: int, dtype: torch.dtype) -> None:
    """On a GPU the batches are of all sizes that are multiplied by tiles of different shapes."""
    sizes = [1, 7, 64, 65, 200, 256, 1000, 8192] if CUDA else [1, 7, 65]
    x, w, bias = operands(sizes[-1], n, k, dtype)
    whole = tiled.invariant_linear(x, w, bias, poisoned(sizes[-1], n, dtype))
    assert_close(whole, naive_linear(x, w, bias))
    for m in sizes[:-1]:
        for first in (0, sizes[-1] - m):
            rows = slice(first, first + m)
            assert torch.equal(tiled.invariant_linear(x[rows], w, bias), whole[rows])


def test_nothing_is_chosen_that_was_not_measured() -> None:
    assert choice.choose_linear(3, 12345, 64) is None
    x, w, bias = operands(3, 12, 64, torch.float32)
    for out in (None, poisoned(3, 12, torch.float32)):
        assert_close(choice.linear(x, w, bias, out, config=None), naive_linear(x, w, bias))
        assert_close(choice.linear(x, w, None, out, config=None), naive_linear(x, w))


def test_the_measured_table_is_ascending() -> None:
    for entries in choice.MEASURED.values():
        assert [most for most, _ in entries] == sorted({most for most, _ in entries})


MATRIX_VECTOR = "engine.kernels.linear.matrix_vector:"
POINTERS = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "out_stride": "i32"}


@pytest.mark.parametrize(("m", "block_n"), [(1, 4), (8, 1)])
def test_matrix_vector_compiles_for_hopper(m: int, block_n: int) -> None:
    shape = {"M": m, "K": 4096, "BLOCK_M": m, "BLOCK_N": block_n, "BLOCK_K": 1024}
    signature = POINTERS | {"bias_ptr": "*bf16", "x_stride": "i32"}
    size = compile_overlapping(
        MATRIX_VECTOR + "matrix_vector_kernel",
        signature,
        shape | {"HAS_BIAS": True},
        early_reads=["w_ptr"],
    )
    # Nothing but the sums goes through shared memory (where several tokens' stride is known to be aligned).
    assert size["shared"] <= (1024 if m == 1 else 8192)


def test_fused_matrix_vector_compiles_for_hopper() -> None:
    shape = {"M": 1, "K": 4096, "BLOCK_M": 1, "BLOCK_N": 4, "BLOCK_K": 1024}
    strides = dict.fromkeys(["x_stride", "residual_stride", "residual_out_stride"], "i32")
    pointers = dict.fromkeys(["residual_ptr", "norm_weight_ptr", "residual_out_ptr"], "*bf16")
    signature = POINTERS | strides | pointers | {"eps": "fp32"}
    early_reads = ["w_ptr"]
    size = compile_overlapping(
        MATRIX_VECTOR + "norm_matrix_vector_kernel", signature, shape, early_reads=early_reads
    )
    assert size["shared"] <= 1024
    signature = {key: POINTERS[key] for key in ("w_ptr", "out_ptr", "n", "out_stride")}
    signature |= {"gate_up_ptr": "*bf16", "gate_up_stride": "i32"}
    size = compile_overlapping(
        MATRIX_VECTOR + "silu_mul_matrix_vector_kernel", signature, shape, early_reads=early_reads
    )
    assert size["shared"] <= 1024


@pytest.mark.parametrize(
    "config",
    [
        choice.small_batch_config(16, 4096, 4096),
        choice.medium_batch_config(256, 4096, 4096),
        tiled.invariant_config(1, 1024, torch.bfloat16),
        tiled.invariant_config(8192, 4096, torch.bfloat16),
        tiled.invariant_config(1, 1024, torch.float32),
    ],
    ids=str,
)
def test_tiles_compile_for_hopper(config: TileConfig) -> None:
    dtype = "fp32" if config == tiled.invariant_config(1, 1024, torch.float32) else "bf16"
    signature = {
        "x_desc": f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>",
        "w_desc": f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>",
        "w_ptr": f"*{dtype}",
        "bias_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "m": "i32",
        "n": "i32",
        "k": "i32",
        "out_stride": "i32",
    }
    shape = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TRANSPOSED": config.transposed,
        "HAS_BIAS": True,
        "PREFETCHED": config.num_stages,
    }
    kernel = "whole_tiles_kernel"
    if config.programs:
        kernel = "shares_kernel"
        signature |= {"partials_ptr": "*fp32", "arrivals_ptr": "*i32"}
    else:
        shape["GROUP_M"] = 8
    size = compile_overlapping(
        f"engine.kernels.linear.tiled:{kernel}",
        signature,
        shape,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert size["shared"] <= 227 * 1024
