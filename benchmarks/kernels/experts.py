"""Layers of experts of three models: our kernels, whole and candidate by candidate, and the floor.

    python -m benchmarks.kernels.experts [--json FILE] [--shapes NAME,...]

A layer is timed in a CUDA graph of many calls that take turns over random tokens and routings, so that the
L2 cache holds no experts but those that a call shares with the one before. The floor is the larger of the
bytes of the experts that are used, at the measured copy bandwidth, and the operations at the measured rate of
bf16 matrix products, both of an H200. "chosen" is what serving takes; "route" and "sort" are the kernels
ahead of the products. A candidate that fails or differs from plain torch is recorded with what was wrong.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import record
from benchmarks.kernels.linear import ARITHMETIC, BANDWIDTH
from benchmarks.kernels.timing import Timer
from engine.kernels.experts.choice import apply_experts, choose_tiles, takes_rows
from engine.kernels.experts.grouped import apply_by_tiles
from engine.kernels.experts.parts import ExpertMatrices, Gating
from engine.kernels.experts.route import route
from engine.kernels.experts.rows import apply_by_rows
from engine.kernels.experts.sort import sort_pairs
from engine.kernels.linear.tiled import TileConfig
from engine.layers.mxfp4 import dequantize

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
# Rows read the experts of each pair anew.
MOST_ROWS = 16
NUM_SETS = 8
COMPILERS = 12
TIMER = Timer(warm_up=2, replays=10, host_calls=0)
DTYPE = torch.bfloat16

Tiles = tuple[TileConfig, TileConfig]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int
    mxfp4: bool = False

    @property
    def expert_bytes(self) -> float:
        """Of one expert's weights and scales."""
        return 3 * self.hidden * self.inner * (17 / 32 if self.mxfp4 else 2)

    @property
    def gating(self) -> Gating:
        """What it makes of gate and up."""
        return Gating("clamped", 1.702, 7.0) if self.mxfp4 else Gating()


SHAPES = {
    "mixtral8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, mxfp4=True),
}


def make_weights(shape: Shape, *, filled: bool = True) -> tuple[ExpertMatrices, ExpertMatrices]:
    """Random gate_up and down."""

    def make(n: int, k: int) -> ExpertMatrices:
        if not shape.mxfp4:
            weight = torch.empty(shape.num_experts, n, k, dtype=DTYPE, device="cuda")
            return ExpertMatrices(weight.normal_(std=k**-0.5) if filled else weight)
        blocks = torch.randint(0, 256, (shape.num_experts, n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.full((shape.num_experts, n, k // 32), 121, dtype=torch.uint8, device="cuda")
        return ExpertMatrices(blocks, scales)

    return make(2 * shape.inner, shape.hidden), make(shape.hidden, shape.inner)


def candidates(shape: Shape, num_tokens: int) -> dict[str, Tiles | None]:
    """Plausible tiles by a name for them; None stands for rows."""
    found: dict[str, Tiles | None] = {"rows": None} if num_tokens <= MOST_ROWS else {}
    num_pairs = num_tokens * shape.top_k
    chosen = choose_tiles(num_pairs, shape.num_experts, DTYPE, is_mxfp4=shape.mxfp4, deterministic=False)
    for tiles in [chosen, *variants(chosen)]:
        found[describe(tiles)] = tiles
    return found


def variants(tiles: Tiles) -> list[Tiles]:
    """Others for as many tokens."""
    first, second = tiles
    if first.transposed:
        return [
            (replace(first, block_n=128, num_warps=8), replace(second, block_n=128, num_warps=8)),
            (replace(first, block_k=64, num_stages=5), replace(second, block_k=64, num_stages=6)),
            (replace(first, num_stages=2), replace(second, block_k=256, num_stages=3)),
        ]
    return [
        (replace(first, num_stages=3), replace(second, num_stages=3)),
        (replace(first, block_n=64, num_warps=4), replace(second, block_n=256, num_warps=8)),
        (replace(first, block_n=128, num_warps=8), replace(second, block_n=128, num_warps=8)),
    ]


def describe(tiles: Tiles) -> str:
    """A few characters that say which tiles they are."""
    return " + ".join(
        f"{'nm' if tile.transposed else 'mn'} {tile.block_m}x{tile.block_n}x{tile.block_k} "
        f"w{tile.num_warps} s{tile.num_stages}"
        for tile in tiles
    )


def product_of(shape: Shape, weights: tuple[ExpertMatrices, ExpertMatrices], tiles: Tiles | None) -> Product:
    """The layer by rows or by tiles, of x, experts and shares."""

    def by_rows(x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return apply_by_rows(x, experts, shares, *weights, shape.gating)

    def by_tiles(x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        assert tiles is not None
        pairs = sort_pairs(experts, shape.num_experts, tiles[0].block_m)
        return apply_by_tiles(
            x, shares, pairs, *weights, shape.gating, gate_up_tile=tiles[0], down_tile=tiles[1]
        )

    return by_rows if tiles is None else by_tiles


def inputs(shape: Shape, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, logits, experts, shares."""
    x = torch.randn(num_tokens, shape.hidden, dtype=DTYPE, device="cuda")
    logits = torch.randn(num_tokens, shape.num_experts, dtype=DTYPE, device="cuda")
    return x, logits, *route(logits, shape.top_k, renormalise=True)


def plain(
    shape: Shape, weights: tuple[ExpertMatrices, ExpertMatrices],
    x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The layer in plain torch, in fp32."""

    def matrix(matrices: ExpertMatrices, expert: int) -> torch.Tensor:
        if matrices.scales is None:
            return matrices.weight[expert].float()
        return dequantize(matrices.weight[expert], matrices.scales[expert], torch.float32)

    out = torch.zeros(x.shape, device="cuda")
    for expert in experts.unique().tolist():
        tokens, places = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].float() @ matrix(weights[0], expert).T).chunk(2, -1)
        if shape.gating.kind == "clamped":
            gate, up = gate.clamp(max=shape.gating.limit), up.clamp(-shape.gating.limit, shape.gating.limit)
            activated = gate * torch.sigmoid(shape.gating.alpha * gate) * (up + 1)
        else:
            activated = torch.nn.functional.silu(gate) * up
        made = activated.to(DTYPE).float() @ matrix(weights[1], expert).T
        out.index_add_(0, tokens, made * shares[tokens, places, None])
    return out


def compile_one(job: tuple[str, int, Tiles | None]) -> None:
    """Fills Triton's cache on disk. What fails is met again in the timing."""
    name, num_tokens, tiles = job
    shape = SHAPES[name]
    x, _, experts, shares = inputs(shape, num_tokens)
    try:
        product_of(shape, make_weights(shape, filled=False), tiles)(x, experts, shares)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{name}: {type(error).__name__}")


def compile_all(names: list[str]) -> None:
    """Compiles every candidate, several at a time: one after the other they would take minutes."""
    jobs = {
        (name, key): (name, min(num_tokens, 64), tiles)
        for name in names
        for num_tokens in TOKENS
        for key, tiles in candidates(SHAPES[name], num_tokens).items()
    }
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs.values()))


def measure(name: str, weights: tuple[ExpertMatrices, ExpertMatrices], num_tokens: int) -> dict[str, Any]:
    """All ways to compute one layer for a number of tokens."""
    shape = SHAPES[name]
    sets = [inputs(shape, num_tokens) for _ in range(NUM_SETS)]
    x, _, experts, shares = sets[0]
    expected = plain(shape, weights, x, experts, shares)

    def timed(product: Product) -> float:
        error = float((product(x, experts, shares).float() - expected).norm() / expected.norm())
        if not error < 2e-2:
            raise ArithmeticError(f"differs from plain torch by {error:.1e}")
        calls = [lambda each=each: product(each[0], each[2], each[3]) for each in sets]
        return round(TIMER.device_us(calls), 2)

    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for key, tiles in candidates(shape, num_tokens).items():
        try:
            times[key] = timed(product_of(shape, weights, tiles))
        except Exception as error:
            failed[key] = f"{type(error).__name__}: {error}"[:200]
    chosen_us = timed(lambda *values: apply_experts(*values, *weights, shape.gating))
    used = sum(each[2].unique().numel() for each in sets) / len(sets)
    moved = used * shape.expert_bytes + 2 * x.numel() * 2
    operations = 6 * num_tokens * shape.top_k * shape.hidden * shape.inner
    floor_us = max(moved / BANDWIDTH, operations / ARITHMETIC) * 1e6
    route_calls = [lambda each=each: route(each[1], shape.top_k, renormalise=True) for each in sets]
    sort_calls = [lambda each=each: sort_pairs(each[2], shape.num_experts, 16) for each in sets]
    rows = takes_rows(num_tokens * shape.top_k, shape.num_experts, is_mxfp4=shape.mxfp4)
    return {
        "shape": name,
        "tokens": num_tokens,
        "experts_used": round(used, 1),
        "floor_us": round(floor_us, 2),
        "chosen": "rows" if rows else "tiles",
        "chosen_us": chosen_us,
        "chosen_share_of_floor": round(floor_us / chosen_us, 3),
        "best": min(times, key=times.__getitem__, default=""),
        "best_us": min(times.values(), default=None),
        "candidates_us": times,
        "route_us": round(TIMER.device_us(route_calls), 2),
        "sort_us": round(TIMER.device_us(sort_calls), 2),
        **({"failed": failed} if failed else {}),
    }


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    names = arguments.shapes.split(",")
    compile_all(names)
    rows = []
    for name in names:
        weights = make_weights(SHAPES[name])
        for num_tokens in TOKENS:
            row = measure(name, weights, num_tokens)
            rows.append(row)
            print(
                f"{name:14} {num_tokens:5} tokens: {row['chosen_us']:9.2f} us, floor {row['floor_us']:9.2f} "
                f"({row['chosen_share_of_floor']:.0%}), best {row['best']} {row['best_us']}",
                flush=True,
            )
        del weights
        torch.cuda.empty_cache()
    record.write(arguments.json, {"device": torch.cuda.get_device_name(), "layers": rows})


if __name__ == "__main__":
    main()
