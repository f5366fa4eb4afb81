"""Products of e4m3 weights against their definition, on fresh random inputs and poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.kernels.experts.naive import naive_gated
from engine.kernels.experts.parts import Gating
from engine.kernels.fp8 import choice, measured
from engine.kernels.fp8.choice import choose_fp8, invariant_config, multiply_fp8
from engine.kernels.fp8.experts import TILES as EXPERT_TILES
from engine.kernels.fp8.experts import Fp8ExpertMatrices, apply_fp8_experts
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.fp8.naive import naive_product, naive_quantize, spread_scales
from engine.kernels.fp8.one_token import OneTokenConfig
from engine.kernels.fp8.quantize import quantize
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig
from tests.kernels.hopper import compile_overlapping
from tests.kernels.interpreter import require_invariant_products

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter computes nonsense with bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# Of the result's rounding; sums of the tensor cores have 14 bits.
TOLERANCE = {torch.float32: 2e-3 if CUDA else 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}

LAYOUTS = ("token", "static", "plain inputs", "blocks", "blocks, plain inputs")
QUANTIZED = ("token", "static", "blocks")
TILES = [
    TileConfig(16, 64, 32, num_warps=4, num_stages=3, transposed=True),
    TileConfig(64, 32, 32, num_warps=4, num_stages=3),
    TileConfig(64, 16, 32, num_warps=4, num_stages=3),
]
BLOCK = (32, 64)
SHAPES = [(22, 272), *([(1024, 3072), (4096, 4096), (1040, 1040)] if CUDA else [])]
# A kernel of rows is compiled for each number of inputs and tokens.
ROW_SHAPES = [(22, 272), *([(1040, 1040)] if CUDA else [])]


def _chosen() -> Iterator[tuple[RowsConfig | TileConfig, bool, int]]:
    """What serving chooses from, whether for blocks, and for how many tokens at most."""
    for in_blocks, table in ((False, measured.CHANNELS), (True, measured.BLOCKS)):
        for n, k in (*table, (1024, 2048), (4096, 4096), (28672, 4096)):
            for m in (1, 2, 3, 4, 8, 16, 32, 64, 65, 256, 1024):
                config = choose_fp8(m, n, k, in_blocks=in_blocks, torch_fits=False)
                assert config is not None
                if isinstance(config, TileConfig):
                    config = replace(config, programs=min(3, config.programs))
                yield config, in_blocks, m
        yield invariant_config(1), in_blocks, 64
        yield invariant_config(65), in_blocks, 65


CHOSEN: dict[tuple[RowsConfig | TileConfig, bool], int] = {}
for _config, _in_blocks, _m in _chosen():
    CHOSEN[_config, _in_blocks] = max(_m, CHOSEN.get((_config, _in_blocks), 0))


def operands(m: int, n: int, k: int, layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, Fp8Matrix]:
    """x [m, k] as part of a wider tensor whose other elements are NaN, and weights for it."""
    wide = torch.full((m, k + 16), torch.nan, dtype=dtype, device=DEVICE)
    x = wide[:, :k].copy_(torch.randn(m, k, device=DEVICE))
    x[0, 3] *= 30
    codes = torch.randn(n, k, device=DEVICE).mul_(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    if layout.startswith("blocks"):
        sizes = (-(-n // BLOCK[0]), -(-k // BLOCK[1]))
        scales = torch.rand(sizes, device=DEVICE).add_(0.1).mul_(1e-3)
        return x, Fp8Matrix(codes, scales, BLOCK, 0 if "plain" in layout else BLOCK[1])
    scales = torch.rand(n, device=DEVICE).add_(0.1).mul_(1e-3)
    # What is larger than the scale allows for is cut off.
    static = torch.tensor([2.0 / 448], device=DEVICE) if layout == "static" else None
    return x, Fp8Matrix(codes, scales, None, 0 if "plain" in layout else k, static)


@pytest.fixture
def _poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a product allocates in the inputs' dtype is NaN, and so is what lies beside it."""
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *shape: Any, **others: Any) -> torch.Tensor:
        size = shape[0] if isinstance(shape[0], tuple) else shape
        dtype = others.get("dtype", like.dtype)
        # Triton's interpreter, which calls it too, names a device.
        if "device" in others or len(size) != 2 or dtype.itemsize == 1:
            return plain(like, *shape, **others)
        wide = torch.full((size[0], size[1] + 8), torch.nan, dtype=dtype, device=like.device)
        # Scales are read as they lie.
        return wide[:, : size[1]] if dtype != torch.float32 else wide.view(-1)[: size[0] * size[1]].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"  # which NaN never passes
    if out.stride(0) > out.shape[1]:  # nothing was written beside it
        beside = out.as_strided((out.shape[0], 8), out.stride(), out.storage_offset() + out.shape[1])
        assert beside.isnan().all()


def workspace_for(m: int, n: int, config: TileConfig) -> ShareWorkspace:
    """Just enough for one product."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    elements = config.programs * config.block_m * config.block_n
    return ShareWorkspace.make(DEVICE, tile_elements=elements, tiles=tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "group"), [(272, 272), (272, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("static", [False, True])
def test_inputs_are_quantized_by_their_largest_or_a_given_scale(
    k: int, group: int, static: bool, dtype: torch.dtype
) -> None:
    x, matrix = operands(5, 8, k, "static", dtype)
    x[1] = 0  # has no scale of its own
    scale = matrix.input_scale if static else None
    codes, scales = quantize(x, group, scale)
    wanted_codes, wanted_scales = naive_quantize(x, group, scale)
    assert torch.allclose(scales, wanted_scales, rtol=1e-6)
    # The inverse of a scale is rounded: of two neighbours either may be the nearer one.
    different = codes.float() != wanted_codes.float()
    assert different.float().mean() < 2e-3
    assert torch.allclose(codes.float(), wanted_codes.float(), rtol=0.13)
    assert not codes.float().isnan().any()
    assert codes.float().abs().max() == 448


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), ROW_SHAPES)
@pytest.mark.parametrize("m", [3, *([1, 8] if CUDA else [])])
def test_a_few_tokens_times_rows(m: int, n: int, k: int, layout: str) -> None:
    x, matrix = operands(m, n, k, layout, DTYPES[-1])
    bias = torch.randn(n, device=DEVICE).to(x.dtype)
    for config, own in ((RowsConfig(4, num_warps=1), None), (RowsConfig(1, num_warps=2), bias)):
        assert_close(multiply_fp8(x, matrix, own, config=config), naive_product(x, matrix, own))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("layout", ["token", "static", "plain inputs"])
@pytest.mark.parametrize(("n", "k"), [(37, 64), (70, 1040)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_token(n: int, k: int, dtype: torch.dtype, layout: str) -> None:
    x, matrix = operands(1, n, k, layout, dtype)
    bias = torch.randn(n, device=DEVICE).to(x.dtype)
    for config, own in ((OneTokenConfig(4, num_warps=1), None), (OneTokenConfig(2, overlap=True), bias)):
        assert_close(multiply_fp8(x, matrix, own, config=config), naive_product(x, matrix, own))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("layout", QUANTIZED)
@pytest.mark.parametrize("config", TILES, ids=["weights first", "tokens first", "within a block"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [17, *([1, 65, 300] if CUDA else [])])
def test_whole_tiles(m: int, n: int, k: int, config: TileConfig, layout: str) -> None:
    x, matrix = operands(m, n, k, layout, DTYPES[-1])
    bias = torch.randn(n, device=DEVICE).to(x.dtype)
    assert_close(multiply_fp8(x, matrix, bias, config=config), naive_product(x, matrix, bias))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("layout", QUANTIZED)
@pytest.mark.parametrize("programs", [5, *([2, 64] if CUDA else [])])
@pytest.mark.parametrize("config", TILES[:2], ids=["weights first", "tokens first"])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 70, 144), *([(65, 40, 208)] if CUDA else [])])
def test_shared_tiles(m: int, n: int, k: int, config: TileConfig, programs: int, layout: str) -> None:
    config = replace(config, programs=programs)
    workspace = workspace_for(m, n, config)
    # A later product finds the workspace as usable as the first one.
    for _ in range(2):
        x, matrix = operands(m, n, k, layout, DTYPES[-1])
        workspace.partials.fill_(torch.nan)
        out = multiply_fp8(x, matrix, config=config, workspace=workspace)
        assert_close(out, naive_product(x, matrix))
        assert not workspace.arrivals.any()


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize(("config", "in_blocks"), CHOSEN, ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1040, 3088)])
@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes over whole tiles")
def test_what_serving_chooses_from(n: int, k: int, config: RowsConfig | TileConfig, in_blocks: bool) -> None:
    m = CHOSEN[config, in_blocks]
    x, matrix = operands(m, n, k, "token", torch.bfloat16)
    if in_blocks:
        scales = torch.rand(-(-n // 128), -(-k // 128), device=DEVICE).add_(0.1).mul_(1e-3)
        matrix = Fp8Matrix(matrix.codes, scales, (128, 128), 128)
    workspace = None
    if isinstance(config, TileConfig) and config.programs:
        workspace = workspace_for(m, n, config)
    out = multiply_fp8(x, matrix, config=replace(config, overlap=True), workspace=workspace)
    assert_close(out, naive_product(x, matrix))


def expert_matrices(
    num_experts: int, n: int, k: int, layout: str, block: tuple[int, int]
) -> Fp8ExpertMatrices:
    codes = torch.randn(num_experts, n, k, device=DEVICE).mul_(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    in_blocks = layout == "blocks"
    sizes = (-(-n // block[0]), -(-k // block[1])) if in_blocks else (n,)
    scales = torch.rand(num_experts, *sizes, device=DEVICE).add_(0.1).mul_(5e-3)
    static = torch.tensor([4.0 / 448], device=DEVICE) if layout == "static" else None
    return Fp8ExpertMatrices(codes, scales, block if in_blocks else None, static)


def naive_fp8_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: Fp8ExpertMatrices,
    down: Fp8ExpertMatrices,
) -> torch.Tensor:
    """A token and an expert at a time, in fp64; what gate and up make is rounded to x's dtype."""

    def product(values: torch.Tensor, matrices: Fp8ExpertMatrices, expert: int) -> torch.Tensor:
        own = Fp8Matrix(
            matrices.codes[expert],
            matrices.scales[expert],
            matrices.block,
            matrices.input_group,
            matrices.input_scale,
        )
        return naive_product(values, own)

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            gate, up = product(x[token : token + 1], gate_up, expert).chunk(2, dim=1)
            made = product(naive_gated(gate, up, "silu").to(x.dtype), down, expert)
            out[token] += shares[token, place].double() * made[0]
    return out


@pytest.mark.parametrize("layout", QUANTIZED)
@pytest.mark.parametrize("block_m", [16, 64])
def test_experts(block_m: int, layout: str) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float16
    num_experts, hidden, inner, top_k = (8, 512, 256, 2) if CUDA else (4, 96, 32, 2)
    block = (128, 128) if CUDA else (32, 32)
    narrow = TileConfig(block_m, block[0], block[1], num_warps=4, num_stages=3, transposed=block_m == 16)
    for num_tokens in (1, 70) if CUDA else (9,):
        wide = torch.full((num_tokens, hidden + 16), torch.nan, dtype=dtype, device=DEVICE)
        x = wide[:, :hidden].copy_(torch.randn(num_tokens, hidden, device=DEVICE))
        order = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(1)[:, :top_k]
        shares = torch.rand(num_tokens, top_k, device=DEVICE)
        gate_up = expert_matrices(num_experts, 2 * inner, hidden, layout, block)
        down = expert_matrices(num_experts, hidden, inner, layout, block)
        arguments = (x, order.int(), shares, gate_up, down)
        out = apply_fp8_experts(*arguments, Gating("silu"), tiles=(narrow, narrow))
        # What gate and up make may round to either of two neighbours.
        expected = naive_fp8_experts(*arguments)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 1e-2, f"relative error {error:.2e}"


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes")
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300, 2000])
def test_experts_by_the_chosen_tiles(num_tokens: int, in_blocks: bool) -> None:
    num_experts, hidden, inner = 8, 1024, 512
    layout = "blocks" if in_blocks else "token"
    x = torch.randn(num_tokens, hidden, device=DEVICE).bfloat16()
    order = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(1)[:, :2].int()
    shares = torch.rand(num_tokens, 2, device=DEVICE)
    gate_up = expert_matrices(num_experts, 2 * inner, hidden, layout, (128, 128))
    down = expert_matrices(num_experts, hidden, inner, layout, (128, 128))
    whole = apply_fp8_experts(x, order, shares, gate_up, down, Gating("silu"))
    some = slice(0, min(num_tokens, 20))
    expected = naive_fp8_experts(x[some], order[some], shares[some], gate_up, down)
    error = (whole[some].double() - expected).norm() / expected.norm()
    assert error < 1e-2, f"relative error {error:.2e}"
    invariant = [
        apply_fp8_experts(*each, gate_up, down, Gating("silu"), deterministic=True)
        for each in ((x, order, shares), (x[some], order[some], shares[some]))
    ]
    assert torch.equal(invariant[0][some], invariant[1])


@pytest.mark.skipif(not CUDA, reason="torch has a scaled product for GPUs only")
@pytest.mark.parametrize("m", [1, 7, 64, 1000])
def test_torch_computes_the_same(m: int) -> None:
    x, matrix = operands(m, 1040, 1040, "token", torch.bfloat16)
    assert choice.torch_fits(matrix, x.dtype)
    bias = torch.randn(1040, device=DEVICE).to(x.dtype)
    product = choice.torch_product(*quantize(x, 1040), matrix, bias, x.dtype)
    assert_close(product, naive_product(x, matrix, bias))


@pytest.mark.parametrize("layout", QUANTIZED)
@pytest.mark.parametrize(("n", "k"), [(72, 144), *([(4096, 4096), (6144, 1024)] if CUDA else [])])
def test_a_token_is_bitwise_the_same_in_any_batch(n: int, k: int, layout: str) -> None:
    """On a GPU the batches are of all sizes that are multiplied by tiles of different shapes."""
    require_invariant_products()
    dtype = torch.bfloat16 if CUDA else torch.float32
    sizes = [1, 7, 64, 65, 256, 1000, 4096] if CUDA else [7, 65]
    x, matrix = operands(sizes[-1], n, k, layout, dtype)

    def product(rows: slice) -> torch.Tensor:
        own = x[rows]
        result: torch.Tensor = multiply_fp8(own, matrix, config=invariant_config(len(own)))
        return result

    whole = product(slice(None))
    assert_close(whole, naive_product(x, matrix))
    for m in sizes[:-1]:
        for first in (0, sizes[-1] - m):
            rows = slice(first, first + m)
            assert torch.equal(product(rows), whole[rows])


def test_rows_and_tiles_of_a_token_are_near_each_other() -> None:
    """They take the same numbers, so that only the order of sums differs."""
    x, matrix = operands(3, 64, 256, "token", torch.float32)
    by_rows = multiply_fp8(x, matrix, config=RowsConfig(2, num_warps=1))
    by_tiles = multiply_fp8(x, matrix, config=TILES[0])
    assert torch.allclose(by_rows, by_tiles, rtol=1e-3, atol=1e-4 if not CUDA else 1e-2)


@pytest.mark.parametrize(
    ("block", "tokens", "fits"),
    [
        (None, 1000, True),
        ((128, 128), 1000, True),
        ((64, 64), 1000, True),
        ((128, 256), 1000, True),
        ((96, 96), 1, False),
        ((16, 16), 1, False),
    ],
)
def test_blocks_that_kernels_take(block: tuple[int, int] | None, tokens: int, fits: bool) -> None:
    matrix = Fp8Matrix(torch.empty(256, 256), torch.ones(1), block, 256)
    assert choice.can_multiply(matrix, tokens) is fits


def test_plain_inputs_are_for_few_tokens_and_rows_must_be_aligned() -> None:
    weights = torch.empty(256, 256)
    assert choice.can_multiply(Fp8Matrix(weights, torch.ones(1)), 8)
    assert not choice.can_multiply(Fp8Matrix(weights, torch.ones(1)), 9)
    assert not choice.can_multiply(Fp8Matrix(torch.empty(256, 250), torch.ones(1), None, 250), 1)


def test_nothing_is_left_of_a_spread_scale_behind_the_matrix() -> None:
    codes = torch.ones(5, 7, dtype=torch.float8_e4m3fn)
    matrix = Fp8Matrix(codes, torch.arange(6.0).view(3, 2), (2, 4), 4)
    assert spread_scales(matrix).shape == (5, 7)
    assert spread_scales(matrix)[4].tolist() == [4.0] * 4 + [5.0] * 3


@pytest.mark.parametrize("tables", [measured.CHANNELS, measured.BLOCKS], ids=["channels", "blocks"])
def test_the_measured_tables_are_ascending(tables: measured.Table) -> None:
    for entries in tables.values():
        assert [most for most, _ in entries] == sorted({most for most, _ in entries})


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("m", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_compile_for_hopper(m: int, in_blocks: bool) -> None:
    signature = {"x_ptr": "*bf16", "w_ptr": "*fp8e4nv", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    signature |= {"w_scales_ptr": "*fp32", **dict.fromkeys(["n", "x_stride", "out_stride"], "i32")}
    shape = {"M": m, "K": 4096, "BLOCK_M": m, "BLOCK_N": 2, "LOADED": 16, "QUANTIZED": True}
    if in_blocks:
        kernel, shape = "block_rows_kernel", {**shape, "OUTPUTS": 128, "INPUTS": 128, "BLOCK_G": 16}
    else:
        kernel, shape = "channel_rows_kernel", {**shape, "static_ptr": None, "THREADS": 128}
    compile_overlapping(
        f"engine.kernels.fp8.rows:{kernel}",
        signature,
        shape,
        early_reads=["w_ptr"] if in_blocks else ["w_ptr", "w_scales_ptr"],
    )


@pytest.mark.parametrize("rows", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_token_compiles_for_hopper(rows: int) -> None:
    compile_overlapping(
        "engine.kernels.fp8.one_token:one_token_kernel",
        {
            **dict.fromkeys(("x_ptr", "w_ptr"), "*i32"),
            **dict.fromkeys(("w_scales_ptr", "static_ptr"), "*fp32"),
            **dict.fromkeys(("bias_ptr", "out_ptr"), "*bf16"),
            "n": "i32",
        },
        {"K": 4096, "ROWS": rows, "THREADS": 64, "QUANTIZED": True, "PACKED": True},
        early_reads=["w_ptr"],
        num_warps=2,
    )


@pytest.mark.parametrize("group", [4096, 128])
def test_quantization_compiles_for_hopper(group: int) -> None:
    signature = {"x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    compile_overlapping(
        "engine.kernels.fp8.quantize:quantize_kernel",
        signature | {"num_tokens": "i32", "x_stride": "i32"},
        {
            "static_ptr": None,
            "K": 4096,
            "GROUP": group,
            "BLOCK_G": 4096 // group,
            "BLOCK_K": group,
        },
        num_warps=4,
    )


@pytest.mark.parametrize(
    ("config", "in_blocks"),
    [
        # Each takes seconds; the largest has the most registers.
        pytest.param(*each, marks=[] if each == (invariant_config(65), True) else pytest.mark.slow)
        for each in CHOSEN
        if isinstance(each[0], TileConfig)
    ],
    ids=str,
)
def test_tiles_compile_for_hopper(config: TileConfig, in_blocks: bool) -> None:
    compile_tiles(config, 128 if in_blocks else 0)


def test_blocks_narrower_than_a_cache_line_compile_for_hopper() -> None:
    compile_tiles(TileConfig(16, 64, 32, num_warps=4, num_stages=6, transposed=True), 32)


def compile_tiles(config: TileConfig, block: int) -> None:
    """With scales of blocks of so many outputs and inputs, or, for 0, of outputs."""
    signature = {
        "x_desc": f"tensordesc<fp8e4nv[{config.block_m}, {config.block_k}]>",
        "w_desc": f"tensordesc<fp8e4nv[{config.block_n}, {config.block_k}]>",
        "w_ptr": "*fp8e4nv",
        "x_scales_ptr": "*fp32",
        "w_scales_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        **dict.fromkeys(["m", "n", "k", "out_stride"], "i32"),
    }
    shape = {
        "OUTPUTS": block,
        "INPUTS": block or config.block_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TRANSPOSED": config.transposed,
        "PREFETCHED": config.num_stages,
    }
    kernel = "fp8_whole_tiles_kernel"
    if config.programs:
        kernel = "fp8_shares_kernel"
        signature |= {"partials_ptr": "*fp32", "arrivals_ptr": "*i32"}
    else:
        shape["GROUP_M"] = 8
    size = compile_overlapping(
        f"engine.kernels.fp8.tiled:{kernel}",
        signature,
        shape,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert size["shared"] <= 227 * 1024


@pytest.mark.parametrize("in_blocks", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "block_m", [pytest.param(each, marks=[] if each == 128 else pytest.mark.slow) for each in EXPERT_TILES]
)
def test_experts_compile_for_hopper(block_m: int, in_blocks: bool) -> None:
    for second, tile in enumerate(EXPERT_TILES[block_m]):
        signature = {
            "w_desc": f"tensordesc<fp8e4nv[{tile.block_n}, {tile.block_k}]>",
            **dict.fromkeys(["x_scales_ptr", "w_scales_ptr"], "*fp32"),
            **dict.fromkeys(["pairs_ptr", "blocks_ptr"], "*i32"),
            **dict.fromkeys(["num_pairs" if second else "num_tokens", "num_blocks"], "i32"),
            "out_ptr": "*bf16",
        }
        shape = {
            "bias_ptr": None,
            "N": 4096,
            "K": 4096,
            "OUTPUTS": 128 if in_blocks else 0,
            "INPUTS": 128,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": 8,
            "TRANSPOSED": tile.transposed,
        }
        if second:
            signature["x_desc"] = f"tensordesc<fp8e4nv[{tile.block_m}, {tile.block_k}]>"
        else:
            signature["x_ptr"] = "*fp8e4nv"
            shape |= {"TOP_K": 2, "KIND": "silu", "ALPHA": 1.0, "LIMIT": 0.0}
        size = compile_overlapping(
            f"engine.kernels.fp8.experts:fp8_{'down' if second else 'gate_up'}_kernel",
            signature,
            shape,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        assert size["shared"] <= 227 * 1024
