"""The kernels of mixtures of experts against their definitions, on random inputs and poisoned outputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.kernels.experts import choice
from engine.kernels.experts.grouped import apply_by_tiles
from engine.kernels.experts.naive import naive_dequantize, naive_experts, naive_route
from engine.kernels.experts.parts import ExpertMatrices, Gating
from engine.kernels.experts.route import route
from engine.kernels.experts.rows import apply_by_rows
from engine.kernels.experts.sort import SortedPairs, most_blocks, sort_pairs
from engine.kernels.linear.tiled import TileConfig
from tests.kernels.hopper import compile_overlapping
from tests.kernels.interpreter import require_invariant_products

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter computes nonsense with bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CLAMPED = Gating("clamped", alpha=1.702, limit=1.0)
TILES = {
    "weights first": TileConfig(16, 32, 32, num_warps=4, num_stages=3, transposed=True),
    "tokens first": TileConfig(32, 16, 64, num_warps=4, num_stages=3),
}
SHARED_LIMIT = 227 << 10


class Layer:
    """A layer of experts of random weights, and what they are in fp64."""

    def __init__(
        self, num_experts: int, hidden: int, inner: int, dtype: torch.dtype, *, mxfp4: bool, bias: bool
    ) -> None:
        self.gate_up, self.gate_up_values = self._make(num_experts, 2 * inner, hidden, dtype, mxfp4, bias)
        self.down, self.down_values = self._make(num_experts, hidden, inner, dtype, mxfp4, bias)

    @staticmethod
    def _make(
        e: int, n: int, k: int, dtype: torch.dtype, mxfp4: bool, bias: bool
    ) -> tuple[ExpertMatrices, torch.Tensor]:
        added = torch.randn(e, n, device=DEVICE).to(dtype) if bias else None
        if not mxfp4:
            weight = torch.randn(e, n, k, device=DEVICE).mul_(k**-0.5).to(dtype)
            return ExpertMatrices(weight, None, added), weight
        blocks = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(122, 126, (e, n, k // 32), dtype=torch.uint8, device=DEVICE)
        return ExpertMatrices(blocks, scales, added), naive_dequantize(blocks, scales)

    def expected(
        self, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor, gating: Gating
    ) -> torch.Tensor:
        return naive_experts(
            x,
            experts,
            shares,
            self.gate_up_values,
            self.down_values,
            gate_up_bias=self.gate_up.bias,
            down_bias=self.down.bias,
            kind=gating.kind,
            alpha=gating.alpha,
            limit=gating.limit,
        )


def tokens(m: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, hidden] as part of a wider tensor whose other elements are NaN."""
    wide = torch.full((m, hidden + 16), torch.nan, dtype=dtype, device=DEVICE)
    return wide[:, :hidden].copy_(torch.randn(m, hidden, device=DEVICE))


def routing(m: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(m, num_experts, device=DEVICE)
    return route(logits, top_k, renormalise=True)


@pytest.fixture
def _poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated is NaN, or a number that is no pair, expert or place."""
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *shape: Any, **others: Any) -> torch.Tensor:
        made = plain(like, *shape, **others)
        if "device" in others:  # Triton's interpreter, which calls it too
            return made
        return made.fill_(torch.nan if made.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"  # which NaN never passes


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (5, 5), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_as_its_definition(
    dtype: torch.dtype, num_experts: int, top_k: int, renormalise: bool
) -> None:
    logits = tokens(7, num_experts, dtype)
    experts, weights = route(logits, top_k, renormalise=renormalise)
    expected, shares = naive_route(logits, top_k, renormalise=renormalise)
    assert torch.equal(logits.gather(1, experts.long()), logits.gather(1, expected))
    assert all(len(set(row)) == top_k for row in experts.tolist())
    torch.testing.assert_close(weights, shares.float(), rtol=1e-5, atol=1e-7)


def test_equal_logits_choose_the_first_experts_and_no_number_chooses_one_that_exists() -> None:
    logits = torch.full((3, 6), 1.5, device=DEVICE)
    logits[1] = torch.nan
    logits[2, 3] = torch.nan
    experts, weights = route(logits, 3, renormalise=True)
    assert experts[0].tolist() == [0, 1, 2]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert experts.min() >= 0
    assert experts.max() < 6
    assert experts[2].tolist() == [0, 1, 2]
    assert bool(weights[1].isnan().all())


def cut(pairs: SortedPairs) -> list[tuple[int, list[int]]]:
    """Each block's expert and pairs."""
    return [
        (expert, pairs.pairs[begin:end].tolist())
        for expert, begin, end in pairs.blocks.T.tolist()
        if expert >= 0
    ]


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_m"),
    [(1, 8, 2, 16), (5, 3, 3, 4), (16, 128, 8, 16), (300, 6, 2, 32), (129, 100, 8, 16)],
)
def test_every_pair_is_in_one_block_of_its_expert(
    num_tokens: int, num_experts: int, top_k: int, block_m: int
) -> None:
    experts, _ = routing(num_tokens, num_experts, top_k)
    chosen = experts.flatten().tolist()
    blocks = cut(sort_pairs(experts, num_experts, block_m))
    assert sorted(pair for _, pairs in blocks for pair in pairs) == list(range(len(chosen)))
    assert all(0 < len(pairs) <= block_m for _, pairs in blocks)
    assert all(chosen[pair] == expert for expert, pairs in blocks for pair in pairs)
    # In order, and no more blocks than are needed.
    ordered = [pair for _, pairs in blocks for pair in pairs]
    assert ordered == sorted(ordered, key=lambda pair: (chosen[pair], pair))
    needed = sum(-(-chosen.count(expert) // block_m) for expert in set(chosen))
    assert len(blocks) == needed <= most_blocks(len(chosen), num_experts, block_m)


def test_all_pairs_may_have_the_same_expert() -> None:
    experts = torch.full((600, 1), 2, dtype=torch.int32, device=DEVICE)
    blocks = cut(sort_pairs(experts, 4, 16))
    assert [expert for expert, _ in blocks] == [2] * 38
    assert [pair for _, pairs in blocks for pair in pairs] == list(range(600))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("gating", [Gating(), CLAMPED, Gating("gelu_tanh")], ids=lambda g: g.kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_tokens(dtype: torch.dtype, gating: Gating) -> None:
    mxfp4 = gating is CLAMPED
    layer = Layer(6, 32, 32 if mxfp4 else 12, dtype, mxfp4=mxfp4, bias=mxfp4)
    x = tokens(2, 32, dtype)
    experts, shares = routing(2, 6, 2)
    out = apply_by_rows(x, experts, shares, layer.gate_up, layer.down, gating)
    assert_close(out, layer.expected(x, experts, shares, gating))


@pytest.mark.usefixtures("_poisoned_results")
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("mxfp4", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles(dtype: torch.dtype, mxfp4: bool, tile: TileConfig) -> None:
    """Experts without tokens, with a few, and with more than a tile; odd numbers of channels."""
    gating = CLAMPED if mxfp4 else Gating()
    layer = Layer(5, 96, 32 if mxfp4 else 40, dtype, mxfp4=mxfp4, bias=mxfp4)
    x = tokens(37, 96, dtype)
    experts, shares = routing(37, 4, 2)
    experts[:30, 0], experts[:30, 1] = 4, 1
    pairs = sort_pairs(experts, 5, tile.block_m)
    out = apply_by_tiles(
        x, shares, pairs, layer.gate_up, layer.down, gating, gate_up_tile=tile, down_tile=tile
    )
    assert_close(out, layer.expected(x, experts, shares, gating))


@pytest.mark.parametrize("mxfp4", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_any_number_of_tokens_is_computed_by_what_is_chosen_for_it(num_tokens: int, mxfp4: bool) -> None:
    dtype = torch.float16
    layer = Layer(16, 64, 32, dtype, mxfp4=mxfp4, bias=True)
    x = tokens(num_tokens, 64, dtype)
    experts, shares = routing(num_tokens, 16, 2)
    for deterministic in (False, True):
        out = choice.apply_experts(
            x, experts, shares, layer.gate_up, layer.down, Gating(), deterministic=deterministic
        )
        assert out.shape == x.shape
        if num_tokens:
            assert_close(out, layer.expected(x, experts, shares, Gating()))


def test_a_tokens_result_is_bitwise_the_same_whatever_else_is_in_the_step() -> None:
    require_invariant_products()
    dtype = torch.bfloat16 if CUDA else torch.float16
    layer = Layer(4, 64, 32, dtype, mxfp4=False, bias=False)
    x = tokens(70, 64, dtype)
    experts, shares = routing(70, 4, 2)

    def compute(chosen: torch.Tensor) -> torch.Tensor:
        return choice.apply_experts(
            x[chosen], experts[chosen], shares[chosen], layer.gate_up, layer.down, Gating(),
            deterministic=True,
        )  # fmt: skip

    together = compute(torch.arange(70, device=DEVICE))
    for chosen in ([3], [69, 1, 5], list(range(69, -1, -2))):
        picked = torch.tensor(chosen, device=DEVICE)
        assert torch.equal(compute(picked), together[picked])


def test_few_pairs_take_rows() -> None:
    rows = partial(choice.takes_rows, num_experts=128)
    assert [rows(pairs, is_mxfp4=False) for pairs in (8, 32, 33)] == [True, True, False]
    assert [rows(pairs, is_mxfp4=True) for pairs in (8, 16, 17)] == [True, True, False]


def test_larger_steps_get_larger_tiles() -> None:
    def block_m(num_pairs: int, **options: bool) -> int:
        options = {"is_mxfp4": False, "deterministic": False, **options}
        return choice.choose_tiles(num_pairs, 128, torch.bfloat16, **options)[0].block_m

    assert [block_m(pairs) for pairs in (8, 2048, 2049, 4096, 8192, 10**6)] == [16, 16, 32, 32, 64, 128]
    assert block_m(8, deterministic=True) == block_m(10**6, deterministic=True)
    assert block_m(10**6, is_mxfp4=True) == 128


# Those between the smallest and the largest tiles of a format.
COMPILED_LATER = ("bf16 32", "mxfp4 32", "mxfp4 64")
TILE_CASES = {
    **{f"bf16 {m}": (tiles, False) for m, tiles in choice._TILES.items()},
    **{f"mxfp4 {m}": (tiles, True) for m, tiles in choice._MXFP4_TILES.items()},
    "fp32": (choice._FP32_TILES, False),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in COMPILED_LATER)) for case in TILE_CASES]
)
def test_tiles_compile_for_hopper(case: str) -> None:
    """With shapes of Qwen3-30B-A3B and gpt-oss-20b."""
    (first, second), mxfp4 = TILE_CASES[case]
    hidden, inner, experts, top_k = (2880, 2880, 32, 4) if mxfp4 else (2048, 768, 128, 8)
    dtype = "fp32" if case == "fp32" else "bf16"
    stored = "u8" if mxfp4 else dtype
    pointers = {"scales_ptr": "*u8", "bias_ptr": f"*{dtype}"} if mxfp4 else {}
    missing = {} if mxfp4 else {"scales_ptr": None, "bias_ptr": None}
    tables = {"pairs_ptr": "*i32", "blocks_ptr": "*i32", "num_blocks": "i32"}
    common = {**tables, "out_ptr": f"*{dtype}", **pointers}

    def options(config: TileConfig) -> dict[str, Any]:
        names = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        return {**names, "GROUP_M": 8, "TRANSPOSED": config.transposed, "E": experts, **missing}

    def weights(config: TileConfig) -> str:
        return f"tensordesc<{stored}[{config.block_n}, {config.block_k // (2 if mxfp4 else 1)}]>"

    sizes = compile_overlapping(
        "engine.kernels.experts.grouped:gate_up_tiles_kernel",
        {"x_ptr": f"*{dtype}", "w_desc": weights(first), **common},
        {
            **options(first), "N": inner, "K": hidden, "TOP_K": top_k, "X_STRIDE": hidden,
            "KIND": "clamped" if mxfp4 else "silu", "ALPHA": 1.702, "LIMIT": 7.0,
        },
        num_warps=first.num_warps,
        num_stages=first.num_stages,
    )  # fmt: skip
    assert sizes["shared"] <= SHARED_LIMIT
    rows = f"tensordesc<{dtype}[{second.block_m}, {second.block_k}]>"
    sizes = compile_overlapping(
        "engine.kernels.experts.grouped:down_tiles_kernel",
        {"x_desc": rows, "w_desc": weights(second), **common},
        {**options(second), "N": hidden, "K": inner},
        num_warps=second.num_warps,
        num_stages=second.num_stages,
    )
    assert sizes["shared"] <= SHARED_LIMIT


@pytest.mark.parametrize("mxfp4", [False, True])
def test_rows_compile_for_hopper(mxfp4: bool) -> None:
    kernel = "engine.kernels.experts.rows:"
    weight = {"w_ptr": "*u8", "scales_ptr": "*u8", "bias_ptr": "*bf16"} if mxfp4 else {"w_ptr": "*bf16"}
    missing = {} if mxfp4 else {"scales_ptr": None, "bias_ptr": None}
    sizes = {"TOP_K": 4, "N": 2880, "K": 2880, "STORED_K": 1440 if mxfp4 else 2880, **missing}
    gating = {"KIND": "clamped", "ALPHA": 1.702, "LIMIT": 7.0}
    common = {"x_ptr": "*bf16", "experts_ptr": "*i32", "out_ptr": "*bf16", **weight}
    blocks = {"BLOCK_N": 2, "BLOCK_K": 2048 if mxfp4 else 1024}
    compile_overlapping(
        f"{kernel}gate_up_rows_kernel", {**common, "x_stride": "i32"}, {**sizes, **gating, **blocks}
    )
    compile_overlapping(f"{kernel}down_rows_kernel", {**common, "shares_ptr": "*fp32"}, {**sizes, **blocks})


def test_routing_sorting_and_adding_up_compile_for_hopper() -> None:
    folder = "engine.kernels.experts."
    compile_overlapping(
        f"{folder}route:route_kernel",
        {"logits_ptr": "*bf16", "experts_ptr": "*i32", "weights_ptr": "*fp32", "logits_stride": "i32"},
        {"E": 128, "TOP_K": 8, "BLOCK_E": 128, "BLOCK_K": 8, "RENORMALISE": True},
        num_warps=1,
    )
    chunk = {"CHUNK": 256, "BLOCK_E": 128}
    counts = {"experts_ptr": "*i32", "counts_ptr": "*i32", "num_pairs": "i32"}
    compile_overlapping(f"{folder}sort:count_kernel", counts, chunk)
    place = {**counts, "pairs_ptr": "*i32", "blocks_ptr": "*i32", "num_chunks": "i32", "max_blocks": "i32"}
    blocks = {**chunk, "BLOCK_M": 16, "BLOCKS": 64, "COUNTS": 16}
    compile_overlapping(f"{folder}sort:place_kernel", place, blocks, num_warps=8)
    del place["counts_ptr"]
    compile_overlapping(f"{folder}sort:place_kernel", place, {**blocks, "counts_ptr": None}, num_warps=8)
    compile_overlapping(
        f"{folder}grouped:combine_kernel",
        {"made_ptr": "*bf16", "shares_ptr": "*fp32", "out_ptr": "*bf16"},
        {"TOP_K": 8, "N": 2048, "BLOCK": 1024},
    )
