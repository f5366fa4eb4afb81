"""The matrix products against their definition, on fresh random inputs and poisoned outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.kernels.linear import choice, matrix_vector, tiled
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.naive import naive_linear
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig
from tests.kernels.hopper import compile_overlapping
from tests.kernels.interpreter import require_invariant_products

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

# What serving chooses from, and for how many tokens at most.
CHOSEN: dict[RowsConfig | TileConfig, int] = {}
for _entries in choice.MEASURED.values():
    for _most, _config in _entries:
        if _config is not None:
            CHOSEN[_config] = max(_most, CHOSEN.get(_config, 0))
CHOSEN_TILES = [config for config in CHOSEN if isinstance(config, TileConfig)]
CHOSEN_SHARES = [config for config in CHOSEN_TILES if config.programs]


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k] as part of a wider tensor whose other elements are NaN, w [n, k], bias [n]."""
    wide = torch.full((m, k + 16), torch.nan, dtype=dtype, device=DEVICE)
    x = wide[:, :k].copy_(torch.randn(m, k, device=DEVICE))
    w = torch.randn(n, k, device=DEVICE).mul_(k**-0.5).to(dtype)
    return x, w, torch.randn(n, device=DEVICE).to(dtype)


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, n] of NaN inside a wider tensor."""
    return torch.full((m, n + 8), torch.nan, dtype=dtype, device=DEVICE)[:, :n]


@pytest.fixture
def _poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a product allocates is `poisoned`."""
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *shape: int, **others: Any) -> torch.Tensor:
        # Triton's interpreter, which calls it too, names a device.
        return plain(like, *shape, **others) if others else poisoned(*shape, like.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def workspace_for(m: int, n: int, config: TileConfig) -> ShareWorkspace:
    """Just enough for one product of m tokens with n rows."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    elements = config.programs * config.block_m * config.block_n
    return ShareWorkspace.make(DEVICE, tile_elements=elements, tiles=tiles)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"  # which NaN never passes
    # Nothing was written beside it.
    if out.stride(0) > out.shape[1]:
        beside = out.as_strided((out.shape[0], 8), out.stride(), out.storage_offset() + out.shape[1])
        assert beside.isnan().all()


def shapes(small: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return small + (LARGE_SHAPES if CUDA else [])


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), shapes([(7, 264), (16, 512)]))
@pytest.mark.parametrize("m", [1, 3, 8, *([2, 5] if CUDA else [])])
def test_a_few_tokens_times_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, n, k, dtype)
    for config in [RowsConfig(4, num_warps=1), RowsConfig(1, num_warps=2)]:
        assert_close(matrix_vector.matrix_vector(x, w, config=config), naive_linear(x, w))
        assert_close(matrix_vector.matrix_vector(x, w, bias, config=config), naive_linear(x, w, bias))


@pytest.mark.skipif(not CUDA, reason="the interpreter has one kernel at a time")
def test_overlapping_products_see_what_the_kernel_before_wrote() -> None:
    sizes = [4096, 1024, 6144, 1024]
    weights = [
        operands(1, n, k, torch.bfloat16)[1] for k, n in zip(sizes, [*sizes[1:], sizes[0]], strict=True)
    ]
    start = torch.randn(2, sizes[0], device=DEVICE).to(torch.bfloat16)

    def chain(overlap: bool) -> torch.Tensor:
        x = start
        for step in range(40):
            config = RowsConfig(1 + step % 2, overlap=overlap)
            x = matrix_vector.matrix_vector(x, weights[step % 4], config=config)
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


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", TILES, ids=["weights first", "tokens first"])
@pytest.mark.parametrize(("n", "k"), shapes([(70, 136), (64, 192)]))
@pytest.mark.parametrize("m", [1, 9, 17, 65])
def test_whole_tiles(m: int, n: int, k: int, config: TileConfig, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, n, k, dtype)
    assert_close(tiled.tiled_linear(x, w, config=config), naive_linear(x, w))
    assert_close(tiled.tiled_linear(x, w, bias, config=config), naive_linear(x, w, bias))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("config", TILES, ids=["weights first", "tokens first"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 264), (17, 70, 136), (65, 40, 200)])
def test_shared_tiles(m: int, n: int, k: int, config: TileConfig, programs: int) -> None:
    config = replace(config, programs=programs)
    dtype = torch.bfloat16 if CUDA else torch.float32
    workspace = workspace_for(m, n, config)
    # A later product finds the workspace as usable as the first one.
    for _ in range(2):
        x, w, bias = operands(m, n, k, dtype)
        workspace.partials.fill_(torch.nan)
        out = tiled.tiled_linear(x, w, bias, config=config, workspace=workspace)
        assert_close(out, naive_linear(x, w, bias))
        assert not workspace.arrivals.any()


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("config", CHOSEN, ids=str)
@pytest.mark.parametrize(("n", "k"), [(70, 264), *(LARGE_SHAPES if CUDA else [])])
def test_what_serving_chooses_from(n: int, k: int, config: RowsConfig | TileConfig) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float32
    overlapping = replace(config, overlap=True)
    for m in sorted({1, CHOSEN[config]}):
        x, w, bias = operands(m, n, k, dtype)
        workspace = workspace_for(m, n, config) if config in CHOSEN_SHARES else None
        out = choice.linear(x, w, bias, config=overlapping, workspace=workspace)
        assert_close(out, naive_linear(x, w, bias))


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes")
@pytest.mark.parametrize("config", CHOSEN_SHARES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 64, 192])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 14336), (1024, 2048)])
def test_shared_tiles_repeat_bitwise(m: int, n: int, k: int, config: TileConfig) -> None:
    x, w, _ = operands(m, n, k, torch.bfloat16)
    workspace = workspace_for(m, n, config)
    first = tiled.tiled_linear(x, w, config=config, workspace=workspace)
    for _ in range(20):
        assert torch.equal(first, tiled.tiled_linear(x, w, config=config, workspace=workspace))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize(
    "dtype", [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])], ids=str
)
@pytest.mark.parametrize(("n", "k"), [(72, 136), *(LARGE_SHAPES if CUDA else [])])
def test_a_row_is_bitwise_the_same_in_any_batch(n: int, k: int, dtype: torch.dtype) -> None:
    """On a GPU the batches are of all sizes that are multiplied by tiles of different shapes."""
    require_invariant_products()
    sizes = [1, 7, 64, 65, 200, 256, 1000, 8192] if CUDA else [1, 7, 65]
    x, w, bias = operands(sizes[-1], n, k, dtype)
    whole = tiled.invariant_linear(x, w, bias)
    assert_close(whole, naive_linear(x, w, bias))
    for m in sizes[:-1]:
        for first in (0, sizes[-1] - m):
            rows = slice(first, first + m)
            assert torch.equal(tiled.invariant_linear(x[rows], w, bias), whole[rows])


@pytest.mark.parametrize(("n", "block_n"), [(1000, 1), (2048, 2), (12345, 4)])
def test_one_token_is_multiplied_by_rows_whatever_their_shape(n: int, block_n: int) -> None:
    assert choice.choose_linear(1, n, 64) == RowsConfig(block_n, overlap=True)


def test_nothing_else_is_chosen_that_was_not_measured() -> None:
    assert choice.choose_linear(3, 12345, 64) is None
    x, w, bias = operands(3, 12, 64, torch.float32)
    assert_close(choice.linear(x, w, bias, config=None), naive_linear(x, w, bias))
    assert_close(choice.linear(x, w, config=None), naive_linear(x, w))


def test_the_measured_table_is_ascending() -> None:
    for entries in choice.MEASURED.values():
        assert [most for most, _ in entries] == sorted({most for most, _ in entries})


@pytest.mark.parametrize(("m", "block_n"), [(1, 4), (8, 1)])
def test_matrix_vector_compiles_for_hopper(m: int, block_n: int) -> None:
    shape = {"M": m, "K": 4096, "BLOCK_M": m, "BLOCK_N": block_n, "BLOCK_K": 1024}
    signature = dict.fromkeys(["x_ptr", "w_ptr", "bias_ptr", "out_ptr"], "*bf16")
    signature |= dict.fromkeys(["n", "x_stride", "out_stride"], "i32")
    size = compile_overlapping(
        "engine.kernels.linear.matrix_vector:matrix_vector_kernel",
        signature,
        shape | {"HAS_BIAS": True},
        early_reads=["w_ptr"],
    )
    # Nothing but the sums goes through shared memory (where several tokens' stride is known to be aligned).
    assert size["shared"] <= (1024 if m == 1 else 8192)


@pytest.mark.parametrize(
    "config",
    [
        *CHOSEN_TILES,
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
