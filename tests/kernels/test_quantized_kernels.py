"""Products with quantized weights against their definitions, on random inputs and poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.cuda.quantized_products import cuda_layout_products
from engine.cuda.word_matrix import word_matrix
from engine.kernels.experts.naive import naive_experts
from engine.kernels.experts.parts import Gating
from engine.kernels.experts.route import route
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig
from engine.kernels.quantized import choice, measured
from engine.kernels.quantized.dequantize import dequantize
from engine.kernels.quantized.experts import ExpertWords, apply_word_experts
from engine.kernels.quantized.int8 import multiply_int8, quantize_tokens
from engine.kernels.quantized.naive import naive_int8, naive_multiply, naive_quantize
from engine.kernels.quantized.rows import WordRowsConfig, fits_rows, multiply_by_rows
from engine.kernels.quantized.tiles import WordConfig, multiply_by_words
from engine.kernels.quantized.words import WordMatrix
from engine.quant.bits import pack_words
from engine.quant.layouts.base import Layout
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.table import Outliers, TableWeights
from engine.quant.layouts.tiles import WordTiles, tiles_of_groups, tiles_of_table
from tests.kernels.hopper import compile_overlapping
from tests.kernels.interpreter import require_invariant_products

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter computes nonsense with bf16.
DTYPES = [torch.float16, *([torch.bfloat16] if CUDA else [])]
# Tables are rounded to the tokens' dtype, integers are exact.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHARED_LIMIT = 227 << 10
TILE_BYTES = 8192


def groups(
    n: int, k: int, bits: int, group_size: int, *, zeros: bool = True, order: bool = False
) -> PackedGroups | Int8Groups:
    """Random integers of so many bits, with scales of fp16."""
    num_groups = -(-k // group_size)
    signed = bits == 8
    low, high = (-128, 128) if signed else (0, 1 << bits)
    kind = torch.int8 if signed else torch.uint8
    codes = torch.randint(low, high, (n, k), device=DEVICE).to(kind)
    common: dict[str, Any] = {
        "scales": (torch.rand(num_groups, n, device=DEVICE) * 0.01 + 0.001).half(),
        "group_size": group_size,
        "zeros": torch.randint(low, high, (num_groups, n), device=DEVICE).to(kind) if zeros else None,
        "zero_point": 0 if signed else 1 << (bits - 1),
        "order": torch.randperm(k, device=DEVICE).int() if order else None,
    }
    if signed:
        return Int8Groups(codes=codes, **common)
    return PackedGroups(bits=bits, words=pack_words(codes, bits), **common)


def table(n: int, k: int, *, shared: bool, group_size: int = 64, outliers: bool = False) -> TableWeights:
    """Random numbers of entries."""
    codes = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    sparse = None
    if outliers:
        dense = torch.where(torch.rand(n, k, device=DEVICE) < 0.02, torch.randn(n, k, device=DEVICE), 0.0)
        dense[n // 2] = 1.0
        csr = dense.cpu().to_sparse_csr()
        sparse = Outliers.make(
            csr.crow_indices().int().to(DEVICE),
            csr.col_indices().int().to(DEVICE),
            csr.values().to(DEVICE),
        )
    return TableWeights(
        words=pack_words(codes, 4),
        table=torch.randn(1 if shared else n, 16, device=DEVICE),
        scales=torch.rand(-(-k // group_size), n, device=DEVICE) + 0.5 if shared else None,
        group_size=group_size,
        outliers=sparse,
    )


def tokens(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, k] as part of a wider tensor whose other elements are NaN."""
    wide = torch.full((m, k + 16), torch.nan, dtype=dtype, device=DEVICE)
    return wide[:, :k].copy_(torch.randn(m, k, device=DEVICE))


@pytest.fixture
def _poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated is NaN, or a large number."""
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *shape: Any, **others: Any) -> torch.Tensor:
        made = plain(like, *shape, **others)
        if "device" in others:  # Triton's interpreter, which calls it too
            return made
        return made.fill_(torch.nan if made.is_floating_point() else 99)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def assert_close(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (tolerance or TOLERANCE[out.dtype]), f"relative error {error:.2e}"  # NaN never passes


def workspace_for(m: int, n: int, config: WordConfig | TileConfig) -> ShareWorkspace:
    """Just enough for one product of m tokens with n outputs."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    elements = max(1, config.programs) * config.block_m * config.block_n
    return ShareWorkspace.make(DEVICE, tile_elements=elements, tiles=tiles)


# Bits, inputs of a group, and inputs: whole blocks and parts of one; groups of a plane, of a block, of more
# and of several, and one group.
GROUPS = {
    "4 by 128": (4, 128, 256),
    "4 by 32": (4, 32, 192),
    "8 by 128": (8, 128, 200),
    "2 by 64": (2, 64, 320),
    "4 by 64": (4, 64, 136),
    "4 by 160": (4, 160, 328),
    "4, one group": (4, 264, 264),
    "8, one group": (8, 136, 136),
    "8 by 32": (8, 32, 64),
    "2 by 256": (2, 256, 512),
}


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("case", [*GROUPS, "4 by 8"])
def test_tiles_stand_for_what_the_layout_does(case: str, zeros: bool) -> None:
    bits, group_size, k = GROUPS.get(case, (4, 8, 24))
    layout = groups(70, k, bits, group_size, zeros=zeros)
    tiles = tiles_of_groups(layout)
    torch.testing.assert_close(tiles.weight(), layout.weight(), rtol=1e-6, atol=0)
    torch.testing.assert_close(tiles.rows(5, 67), layout.rows(5, 67), rtol=1e-6, atol=0)
    assert tiles.words.nbytes % TILE_BYTES == 0


@pytest.mark.parametrize("shared", [True, False], ids=["one table", "a table an output"])
def test_tiles_stand_for_what_a_table_does(shared: bool) -> None:
    layout = table(70, 128, shared=shared, outliers=not shared)
    assert torch.equal(tiles_of_table(layout).weight(), layout.weight())


CONFIGS = {
    "whole tiles": WordConfig(16, num_stages=2),
    "wide tiles": WordConfig(32, 128, num_warps=8, num_stages=2),
    "shares": WordConfig(16, num_stages=2, programs=3),
    "few tokens": WordConfig(8, num_stages=2, programs=2),
}


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPS)
def test_integers_times_tokens(case: str, dtype: torch.dtype, config: WordConfig) -> None:
    bits, group_size, k = GROUPS[case]
    layout = groups(150, k, bits, group_size)
    matrix = word_matrix(tiles_of_groups(layout))
    bias = torch.randn(150, device=DEVICE).to(dtype)
    workspace = workspace_for(37, 150, config)
    for m in (1, 37):
        x = tokens(m, k, dtype)
        workspace.partials.fill_(torch.nan)
        out = multiply_by_words(x, matrix, bias, config=config, workspace=workspace)
        assert_close(out, naive_multiply(x, layout.weight(), bias))
        assert not workspace.arrivals.any()


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize(
    "config", [WordRowsConfig(32, 4), WordRowsConfig(16, 2), WordRowsConfig(8, 1, overlap=True)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["4 by 128", "8 by 128", "4, one group", "8, one group"])
def test_integers_times_one_token(case: str, dtype: torch.dtype, config: WordRowsConfig) -> None:
    bits, group_size, k = GROUPS[case]
    layout = groups(150, k, bits, group_size)
    matrix = word_matrix(tiles_of_groups(layout))
    assert fits_rows(matrix)
    x = tokens(1, k, dtype)
    bias = torch.randn(150, device=DEVICE).to(dtype)
    out = multiply_by_rows(x, matrix, bias, config=config)
    assert_close(out, naive_multiply(x, layout.weight(), bias))
    assert_close(multiply_by_rows(x, matrix, config=config), naive_multiply(x, layout.weight()))


def test_groups_of_parts_of_a_block_and_tables_are_multiplied_in_tiles() -> None:
    for case in ("4 by 32", "2 by 64", "4 by 160"):
        bits, group_size, k = GROUPS[case]
        assert not fits_rows(word_matrix(tiles_of_groups(groups(150, k, bits, group_size))))
    assert not fits_rows(word_matrix(tiles_of_table(table(100, 192, shared=True))))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("shared", [True, False], ids=["one table", "a table an output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_tables_times_tokens(dtype: torch.dtype, shared: bool) -> None:
    layout = table(100, 192, shared=shared)
    matrix = word_matrix(tiles_of_table(layout))
    x = tokens(5, 192, dtype)
    out = multiply_by_words(x, matrix, config=CONFIGS["whole tiles"])
    assert_close(out, naive_multiply(x, layout.weight()))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("case", [*GROUPS, "4 by 8", "table", "tables"])
def test_numbers_of_a_part_of_a_matrix(case: str, dtype: torch.dtype) -> None:
    if case in ("table", "tables"):
        layout: Layout = table(150, 128, shared=case == "table")
        tiles = tiles_of_table(layout)
    else:
        bits, group_size, k = GROUPS.get(case, (4, 8, 24))
        layout = groups(150, k, bits, group_size)
        tiles = tiles_of_groups(layout)
    beside = torch.full((90, layout.in_features), 99.0, dtype=dtype, device=DEVICE)
    dequantize(word_matrix(tiles), 64, beside[:86])
    expected = layout.weight()[64:].double()
    assert_close(beside[:86], expected)
    assert bool((beside[86:] == 99).all())


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "in order of their own": lambda: groups(70, 256, 4, 128, order=True),
    "8 bits": lambda: groups(70, 128, 8, 128, zeros=False),
    "odd groups": lambda: groups(70, 64, 4, 8),
    "odd inputs": lambda: groups(70, 24, 4, 24, zeros=False),
    "a table with outliers": lambda: table(70, 128, shared=False, outliers=True),
}


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_serving_does_with_a_layout(name: str, deterministic: bool) -> None:
    """Of a few tokens, and of so many that weights are dequantized first; in fp32 they always are."""
    layout = LAYOUTS[name]()
    bias = torch.randn(70, device=DEVICE)
    for dtype in (torch.float32, torch.float16):
        products = cuda_layout_products(DEVICE, deterministic=deterministic)
        prepared = products.prepared(layout)
        assert isinstance(prepared, WordTiles)
        for m in (3, *((300,) if CUDA else ())):
            x = tokens(m, layout.in_features, dtype)
            expected = layout.multiply(x.float(), bias).double()
            assert_close(products.multiply(prepared, x, bias.to(dtype)), expected, 3e-3)
    assert_close(prepared.multiply(x, bias.to(dtype)), expected, 3e-3)


LARGE: dict[str, Callable[[], Layout]] = {
    "4 by 128": lambda: groups(4096, 4096, 4, 128),
    "4 by 32": lambda: groups(1030, 1032, 4, 32),
    "4, one group": lambda: groups(6144, 1024, 4, 1024, zeros=False),
    "2 by 64": lambda: groups(2048, 3072, 2, 64),
    "8, one group": lambda: groups(4096, 14336, 8, 14336, zeros=False),
    "8 by 128": lambda: groups(1024, 2048, 8, 128),
    "one table": lambda: table(4096, 4096, shared=True),
    "tables": lambda: table(1030, 1024, shared=False, outliers=True),
}


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes")
@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_tokens_times_large_matrices(name: str, dtype: torch.dtype) -> None:
    layout = LARGE[name]()
    products = cuda_layout_products(DEVICE, deterministic=False)
    prepared, weight = products.prepared(layout), layout.weight()
    for m in (1, 3, 16, 17, 33, 64, 100, 128, 129, 300, 1000):
        x = tokens(m, layout.in_features, dtype)
        out = products.multiply(prepared, x, None)
        assert_close(out, naive_multiply(x, weight))
        if m <= 128:
            for _ in range(5):
                assert torch.equal(products.multiply(prepared, x, None), out)


def test_a_large_matrix_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cuda.quantized_products._SCRATCH_BYTES", 128 * 128 * 4)
    layout = groups(150, 128, 4, 32)
    products = cuda_layout_products(DEVICE, deterministic=False)
    x = tokens(5, 128, torch.float32)
    out = products.multiply(products.prepared(layout), x, None)
    assert_close(out, naive_multiply(x, layout.weight()))


def test_a_tokens_product_is_bitwise_the_same_in_any_batch() -> None:
    require_invariant_products()
    dtype = torch.bfloat16 if CUDA else torch.float16
    n, k = (4096, 4096) if CUDA else (70, 256)
    sizes = (1, 16, 17, 64, 65, 200) if CUDA else (1, 17, 20)
    products = cuda_layout_products(DEVICE, deterministic=True)
    prepared = products.prepared(groups(n, k, 4, 128))
    x = tokens(sizes[-1], k, dtype)
    whole = products.multiply(prepared, x, None)
    for m in sizes[:-1]:
        for rows in (slice(0, m), slice(sizes[-1] - m, None)):
            assert torch.equal(products.multiply(prepared, x[rows], None), whole[rows])


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("static", ["", "static", "zero"])
def test_tokens_become_8_bits(dtype: torch.dtype, static: str) -> None:
    x = tokens(5, 2100, dtype)
    x[2] = 0
    scale = torch.tensor([0.02], device=DEVICE) if static else None
    zero = torch.tensor([-7], dtype=torch.int32, device=DEVICE) if static == "zero" else None
    codes, scales = quantize_tokens(x, scale, zero)
    expected, expected_scales = naive_quantize(x, scale, zero)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(scales, expected_scales.expand(5, -1).reshape(-1)[:5], rtol=1e-6, atol=0)


INT8_CONFIGS = {
    "weights first, shares": TileConfig(16, 64, 64, num_warps=4, num_stages=3, transposed=True, programs=3),
    "tokens first": TileConfig(64, 32, 64, num_warps=4, num_stages=3),
}


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("config", INT8_CONFIGS.values(), ids=INT8_CONFIGS)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("m", [1, 37])
def test_8_bits_times_8_bits(m: int, zero: bool, config: TileConfig) -> None:
    n, k = 70, 208
    codes = torch.randint(-128, 128, (m, k), device=DEVICE).to(torch.int8)
    w = torch.randint(-128, 128, (n, k), device=DEVICE).to(torch.int8)
    input_scales, scales = torch.rand(m, device=DEVICE), torch.rand(n, device=DEVICE)
    bias = torch.randn(n, device=DEVICE)
    own = torch.tensor([9], dtype=torch.int32, device=DEVICE) if zero else None
    out = multiply_int8(
        codes, input_scales, w, scales, bias, torch.float32,
        zero=own, sums=w.sum(1, dtype=torch.int32) if zero else None,
        config=config, workspace=workspace_for(m, n, config),
    )  # fmt: skip
    expected = naive_int8(codes, input_scales[:, None], w, scales, own) + bias.double()
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("kind", ["tokens", "static", "zero"])
def test_what_serving_does_with_8_bits_of_both(kind: str) -> None:
    codes = torch.randint(-128, 128, (70, 128), device=DEVICE).to(torch.int8)
    has_zero = kind == "zero"
    layout = Int8Channels(
        codes=codes,
        scales=torch.rand(70, device=DEVICE),
        input_scale=None if kind == "tokens" else torch.tensor([0.03], device=DEVICE),
        input_zero=torch.tensor([5], dtype=torch.int32, device=DEVICE) if has_zero else None,
        sums=codes.sum(1, dtype=torch.int32) if has_zero else None,
    )
    products = cuda_layout_products(DEVICE, deterministic=False)
    x, bias = tokens(3, 128, torch.float16), torch.randn(70, device=DEVICE).half()
    assert_close(products.multiply(layout, x, bias), layout.multiply(x.float(), bias.float()).double())


def experts_of(
    num_experts: int, n: int, k: int, bits: int, group_size: int
) -> tuple[ExpertWords, torch.Tensor]:
    """Random experts, and what they stand for [E, n, k]."""
    layouts = [groups(n, k, bits, group_size) for _ in range(num_experts)]
    tiles = [tiles_of_groups(layout) for layout in layouts]
    matrix = WordMatrix(
        torch.cat([each.words for each in tiles]),
        torch.cat([each.groups for each in tiles]),
        n,
        k,
        bits,
        group_size,
    )
    bias = torch.randn(num_experts, n, device=DEVICE).half()
    return ExpertWords(matrix, bias), torch.stack([layout.weight() for layout in layouts])


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 128)])
def test_experts(bits: int, group_size: int, deterministic: bool) -> None:
    gating = Gating("clamped", 1.702, 7.0) if deterministic else Gating()
    gate_up, gate_up_values = experts_of(4, 80, 128, bits, group_size)
    down, down_values = experts_of(4, 128, 40, bits, group_size)
    x = tokens(9, 128, torch.float16)
    logits = torch.randn(9, 4, device=DEVICE)
    chosen, shares = route(logits, 2, renormalise=True)
    out = apply_word_experts(x, chosen, shares, gate_up, down, gating, deterministic=deterministic)
    expected = naive_experts(
        x, chosen, shares, gate_up_values, down_values,
        gate_up_bias=gate_up.bias, down_bias=down.bias,
        kind=gating.kind, alpha=gating.alpha, limit=gating.limit,
    )  # fmt: skip
    assert_close(out, expected)


def test_tables_of_choices_are_ascending_and_fit_their_kinds() -> None:
    for entries in (measured.WORDS, measured.INT8, *measured.MEASURED.values()):
        assert [most for most, _ in entries] == sorted({most for most, _ in entries})
    assert choice.choose_words("int4", 1, 96, 64) == measured.WORDS[0][1]
    assert choice.choose_words("int4", 16, 96, 64).overlap
    assert choice.choose_words("int4", 100_000, 96, 64) is None
    assert choice.choose_int8(100_000, 96, 64) == replace(measured.INT8[-1][1], overlap=True)
    assert [choice.invariant_words(m).block_m for m in (1, 17, 128, 4096)] == [16, 32, 128, 128]


COMPILED = {
    "a token": (measured.WORDS[0][1], 4, 128, False),
    "groups of 32": (measured.WORDS[1][1], 4, 32, False),
    "128 tokens": (measured.WORDS[4][1], 4, 128, False),
    "256 tokens": (WordConfig(256, 128, num_warps=8, num_stages=3), 4, 128, False),
    "8 bits": (measured.WORDS[0][1], 8, 0, False),
    "a table": (measured.WORDS[2][1], 4, 64, True),
    "two warps": (WordConfig(8, 64, num_warps=2, num_stages=5, programs=3), 4, 128, False),
    "2 bits": (choice.invariant_words(100), 2, 64, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_products_of_words_compile_for_hopper(case: str) -> None:
    config, bits, group, is_table = COMPILED[case]
    block_k = 512 // bits
    num_stages = WordMatrix(torch.empty(0), torch.empty(0), 0, 0, bits, group).stages(
        config.block_m, config.block_n, config.num_stages
    )
    signature = {
        "x_desc": f"tensordesc<bf16[{config.block_m}, {block_k}]>",
        "words_desc": f"tensordesc<i32[{config.block_n}, 16]>",
        "words_ptr": "*i32",
        "groups_ptr": "*i32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        **dict.fromkeys(("m", "n", "k", "out_stride"), "i32"),
    }
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "BITS": bits,
        "GROUP": group,
        "TABLES": int(is_table),
        "SCALED": group != 0 and (group % block_k != 0 or config.block_m > 128),
        "PACKED": True,
        "PREFETCHED": num_stages,
    }
    if is_table:
        signature["table_ptr"] = "*fp32"
    else:
        constants["table_ptr"] = None
    kernel = "whole_words_kernel"
    if config.programs:
        kernel = "shared_words_kernel"
        signature |= {"partials_ptr": "*fp32", "arrivals_ptr": "*i32"}
    else:
        constants["GROUP_M"] = 8
    size = compile_overlapping(
        f"engine.kernels.quantized.tiles:{kernel}",
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=num_stages,
    )
    assert size["shared"] <= SHARED_LIMIT
    assert size["in_flight"] == 0  # see engine/kernels/tensor_cores.py


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_one_token_compile_for_hopper(bits: int) -> None:
    compile_overlapping(
        "engine.kernels.quantized.rows:word_rows_kernel",
        {
            **dict.fromkeys(("x_ptr", "words_ptr", "groups_ptr"), "*i32"),
            **dict.fromkeys(("bias_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys(("n", "one"), "i32"),
        },
        {"K": 4096, "BITS": bits, "GROUP": 128, "ROWS": 32, "WARPS": 4},
        early_reads=["words_ptr", "groups_ptr"],
        num_warps=4,
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted({config for _, config in measured.INT8}, key=str), ids=str)
def test_products_of_8_bits_compile_for_hopper(config: TileConfig) -> None:
    size = compile_overlapping(
        "engine.kernels.quantized.int8:int8_kernel",
        {
            "x_desc": f"tensordesc<i8[{config.block_m}, {config.block_k}]>",
            "w_desc": f"tensordesc<i8[{config.block_n}, {config.block_k}]>",
            **dict.fromkeys(("input_scales_ptr", "scales_ptr"), "*fp32"),
            **dict.fromkeys(("zero_ptr", "sums_ptr", "partials_ptr", "arrivals_ptr"), "*i32"),
            **dict.fromkeys(("bias_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys(("m", "n", "k", "out_stride"), "i32"),
        },
        {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "TRANSPOSED": config.transposed,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert size["shared"] <= SHARED_LIMIT


@pytest.mark.slow
def test_what_is_around_the_products_compiles_for_hopper() -> None:
    folder = "engine.kernels.quantized."
    compile_overlapping(
        f"{folder}int8:quantize_kernel",
        {"x_ptr": "*bf16", "codes_ptr": "*i8", "scales_ptr": "*fp32", "x_stride": "i32"},
        {"scale_ptr": None, "zero_ptr": None, "K": 14336, "BLOCK": 2048},
        num_warps=8,
    )
    compile_overlapping(
        f"{folder}outliers:add_outliers_kernel",
        {
            **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys(("starts_ptr", "columns_ptr"), "*i32"),
            "values_ptr": "*fp32",
            **dict.fromkeys(("m", "x_stride", "out_stride"), "i32"),
        },
        {"BLOCK_M": 8, "BLOCK": 128},
        early_reads=["starts_ptr"],
    )
    for bits, group, table_type in ((4, 128, None), (8, 0, None), (4, 64, "*fp32")):
        compile_overlapping(
            f"{folder}dequantize:dequantize_kernel",
            {
                **dict.fromkeys(("words_ptr", "groups_ptr"), "*i32"),
                "out_ptr": "*bf16",
                **dict.fromkeys(("begin", "n", "k", "rows"), "i32"),
                **({"table_ptr": table_type} if table_type else {}),
            },
            {
                **({} if table_type else {"table_ptr": None}),
                "BITS": bits,
                "GROUP": group,
                "BLOCK_N": 64,
                "BLOCK_K": 512 // bits,
                "TABLES": int(table_type is not None),
                "PACKED": True,
            },
            early_reads=["words_ptr"],
        )
    compile_overlapping(
        f"{folder}experts:gate_kernel",
        {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"},
        {"N": 768, "BLOCK": 1024, "KIND": "silu", "ALPHA": 1.0, "LIMIT": 0.0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_products_of_experts_compile_for_hopper(block_m: int) -> None:
    size = compile_overlapping(
        "engine.kernels.quantized.experts:expert_words_kernel",
        {
            "words_desc": "tensordesc<i32[64, 16]>",
            **dict.fromkeys(("groups_ptr", "pairs_ptr", "blocks_ptr"), "*i32"),
            **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16"),
            "num_blocks": "i32",
        },
        {
            "X_STRIDE": 2048, "TOP_K": 8, "N": 1536, "K": 2048, "BLOCK_M": block_m, "BLOCK_N": 64,
            "BLOCK_K": 128, "BITS": 4, "GROUP": 128, "SCALED": False, "PACKED": True,
        },
        num_warps=4,
        num_stages=4,
    )  # fmt: skip
    assert size["shared"] <= SHARED_LIMIT
    assert size["in_flight"] == 0
