"""Matrix products with the weights of two model shapes: torch's against this repository's, and the floor.

    python -m benchmarks.kernels.linear [--json FILE]

Each product is timed in a CUDA graph of many calls that take turns over copies of the weights which do not
fit in the L2 cache. The floor is the larger of the bytes at the measured copy bandwidth and the operations at
the measured rate of bf16 matrix products, both of an H200. A candidate whose first timing is 1.5 times the
best is not timed again; one that fails or differs from torch's result is recorded with what was wrong.
Products that overlap with the one before ("o") gain here from their neighbours, as they would not from other
kernels; so they are compared with each other only.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record
from engine.kernels.linear.choice import linear
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig

BANDWIDTH = 4.3e12  # B/s
ARITHMETIC = 790e12  # FLOP/s
# Five times the L2 cache.
ROTATED_BYTES = 256 << 20
COMPILERS = 12

DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
PREFILL = 8192
# (N, K)
SHAPES = {
    "llama8b qkv": (6144, 4096),
    "llama8b o": (4096, 4096),
    "llama8b gate_up": (28672, 4096),
    "llama8b down": (4096, 14336),
    "llama8b head": (128256, 4096),
    "qwen06b qkv": (4096, 1024),
    "qwen06b o": (1024, 2048),
    "qwen06b gate_up": (6144, 1024),
    "qwen06b down": (1024, 3072),
    "qwen06b head": (151936, 1024),
}
PREFILL_SHAPES = ("llama8b qkv", "llama8b gate_up", "llama8b down", "qwen06b gate_up")

# Programs on an H200.
ONE_PER_SM = 132
TWO_PER_SM = 2 * ONE_PER_SM
Config = RowsConfig | TileConfig


def candidates(m: int, n: int) -> list[Config]:
    """The plausible configs for m tokens and n output features."""
    match m:
        case 1:
            rows = [RowsConfig(4), RowsConfig(2), RowsConfig(1), RowsConfig(2, num_warps=2)]
            return [
                *rows,
                RowsConfig(8, num_warps=2) if n > 4096 else RowsConfig(1, num_warps=2),
                *_overlapping(),
            ]
        case 2:
            return [
                *_overlapping(),
                RowsConfig(2),
                RowsConfig(4) if n > 4096 else RowsConfig(1),
                *_tiny_tiles()[:3],
            ]
        case 4:
            return [RowsConfig(2), RowsConfig(1), *_tiny_tiles()]
        case 8:
            return [RowsConfig(1), *_tiny_tiles()]
        case 16:
            return _tiny_tiles()
        case 32:
            narrow = TileConfig(32, 64, 128, 4, 4, transposed=True)
            wide = TileConfig(32, 128, 128, 4, 4, transposed=True)
            return [
                replace(narrow, programs=TWO_PER_SM),
                narrow,
                replace(wide, programs=ONE_PER_SM),
                TileConfig(32, 128, 64, 4, 4, transposed=True, programs=TWO_PER_SM),
            ]
        case 64:
            return [
                TileConfig(64, 128, 64, 4, 4, programs=TWO_PER_SM),
                TileConfig(64, 128, 64, 4, 4, transposed=True, programs=TWO_PER_SM),
                TileConfig(64, 64, 64, 4, 6, programs=TWO_PER_SM),
                TileConfig(64, 128, 128, 4, 4, programs=ONE_PER_SM),
                TileConfig(64, 64, 128, 4, 3) if n <= 8192 else TileConfig(64, 128, 128, 4, 4),
            ]
        case 128:
            return [
                TileConfig(128, 64, 64, 4, 4, programs=TWO_PER_SM),
                TileConfig(128, 128, 64, 8, 5, programs=ONE_PER_SM),
                TileConfig(128, 128, 64, 4, 3, programs=TWO_PER_SM),
                TileConfig(128, 256, 64, 8, 4, programs=ONE_PER_SM),
                TileConfig(128, 32, 128, 4, 4) if n <= 8192 else TileConfig(128, 128, 64, 8, 3),
            ]
        case 192:
            return [
                TileConfig(64, 128, 64, 4, 4, programs=TWO_PER_SM),
                TileConfig(64, 256, 64, 4, 4, programs=ONE_PER_SM),
                TileConfig(128, 128, 64, 4, 3, programs=TWO_PER_SM),
                TileConfig(256, 128, 64, 8, 4, programs=ONE_PER_SM),
                TileConfig(64, 128, 64, 4, 4) if n <= 8192 else TileConfig(64, 256, 64, 4, 4),
            ]
        case 256:
            return [
                TileConfig(128, 128, 64, 8, 5, programs=ONE_PER_SM),
                TileConfig(128, 128, 64, 4, 3, programs=TWO_PER_SM),
                TileConfig(128, 256, 64, 8, 4, programs=ONE_PER_SM),
                TileConfig(256, 128, 64, 8, 4, programs=ONE_PER_SM),
                TileConfig(128, 64, 64, 4, 4) if n <= 8192 else TileConfig(256, 128, 64, 8, 4),
            ]
    return [TileConfig(256, 128, 64, 8, 4), TileConfig(128, 256, 64, 8, 4, programs=ONE_PER_SM)]


def _overlapping() -> list[Config]:
    return [RowsConfig(block_n, overlap=True) for block_n in (1, 2)]


def _tiny_tiles() -> list[Config]:
    tile = TileConfig(16, 64, 128, 4, 5, transposed=True)
    return [
        replace(tile, programs=TWO_PER_SM),
        tile,
        TileConfig(16, 128, 128, 4, 5, transposed=True, programs=ONE_PER_SM),
        TileConfig(16, 64, 256, 4, 4, transposed=True, programs=ONE_PER_SM),
    ]


def describe(config: Config | None) -> str:
    """A few characters that say which config it is."""
    match config:
        case RowsConfig():
            return f"rows {config.block_n} w{config.num_warps}{' o' * config.overlap}"
        case TileConfig():
            order = "nm" if config.transposed else "mn"
            tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
            shares = f" p{config.programs}" if config.programs else ""
            return f"{order} {tile} w{config.num_warps} s{config.num_stages}{shares}"
    return "torch"


def make_workspace(device: torch.device) -> ShareWorkspace:
    """Enough for every candidate and all weights."""
    return ShareWorkspace.make(device, tile_elements=TWO_PER_SM * 128 * 256, tiles=1 << 14)


class Bench:
    """Weights and space for one (N, K) after another, and how a product with them is timed."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.workspace = make_workspace(self.device)

    def weights(self, n: int, k: int) -> list[torch.Tensor]:
        """Copies of random weights, together larger than the cache."""
        copies = max(1, math.ceil(ROTATED_BYTES / (2 * n * k)))
        stacked = torch.empty(copies, n, k, dtype=torch.bfloat16, device=self.device)
        return list(stacked.normal_(std=k**-0.5))

    def product(
        self, x: torch.Tensor, weights: list[torch.Tensor], config: Config | None, budget: float
    ) -> float:
        """Seconds of one product; `budget` is the best time known, past which a rough timing will do."""

        def call(w: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = linear(x, w, config=config, workspace=self.workspace)
            return product

        if config is None:
            call(weights[0])
        else:
            check(call, x, weights[0])
        return self.time(call, weights, budget)

    def time(self, call: Callable[[Any], Any], weights: Sequence[Any], budget: float) -> float:
        """Seconds of one call; the caller has warmed it up."""
        calls = len(weights) * math.ceil(8 / len(weights))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(calls):
                call(weights[index % len(weights)])
        graph.replay()
        rough = _seconds(graph, 1) / calls
        if rough > 1.5 * budget:
            return rough
        replays = max(1, math.ceil(2e-3 / (rough * calls)))
        return statistics.median(_seconds(graph, replays) for _ in range(5)) / calls


def check(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> None:
    """Raises ArithmeticError if the call's product differs from torch's."""
    expected = F.linear(x, w)
    # Fills what is allocated with NaN: what a product leaves unwritten may be the result of another.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = call(w)
    finally:
        torch.use_deterministic_algorithms(False)
    error = float((out.float() - expected.float()).norm() / expected.float().norm())
    if not error < 1e-2:
        raise ArithmeticError(f"differs from torch's result by {error:.1e}")


def _seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays


def compile_one(job: tuple[Config, int, int]) -> None:
    """Fills Triton's cache on disk with what (config, m, k) needs. What fails is met again in the timing."""
    config, m, k = job
    x, w = (torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (m, 512))
    try:
        linear(x, w, config=config, workspace=make_workspace(x.device))
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{describe(config)}: {type(error).__name__}")


def compile_all() -> None:
    """Compiles every candidate, several at a time: one after the other they would take minutes."""
    # A kernel of tiles is one for all m and k; one of rows has them built in.
    jobs = {}
    for m in (*DECODE, PREFILL):
        for n, k in SHAPES.values():
            for config in candidates(m, n):
                jobs[(config, m, k) if isinstance(config, RowsConfig) else config] = (config, min(m, 512), k)
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs.values()))


def measure_shape(bench: Bench, name: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every candidate for each number of tokens times the weights called `name`."""
    n, k = SHAPES[name]
    weights = bench.weights(n, k)
    rows = []
    for m in batches:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=bench.device)
        torch_s = bench.product(x, weights, None, math.inf)
        own_us: dict[str, float] = {}
        failed: dict[str, str] = {}
        best, best_s = "torch", torch_s
        overlapped_s = math.inf
        for config in candidates(m, n):
            try:
                seconds = bench.product(x, weights, config, best_s)
            except Exception as error:
                failed[describe(config)] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
                continue
            if isinstance(config, RowsConfig) and config.overlap:
                overlapped_s = min(overlapped_s, seconds)
                continue
            own_us[describe(config)] = round(seconds * 1e6, 2)
            if seconds < best_s:
                best, best_s = describe(config), seconds
        moved, operations = 2 * (n * k + m * k + m * n), 2 * m * n * k
        floor = max(moved / BANDWIDTH, operations / ARITHMETIC)
        rows.append(
            {
                "weights": name,
                "m": m,
                "n": n,
                "k": k,
                "torch_us": round(torch_s * 1e6, 2),
                "candidates": len(own_us),
                "fastest_candidates_us": fastest(own_us),
                "best": best,
                "best_us": round(best_s * 1e6, 2),
                "overlapped_us": None if overlapped_s == math.inf else round(overlapped_s * 1e6, 2),
                "best_gb_per_s": round(moved / best_s / 1e9),
                "best_tflop_per_s": round(operations / best_s / 1e12, 1),
                "best_share_of_floor": round(floor / best_s, 3),
                "torch_share_of_floor": round(floor / torch_s, 3),
                **({"failed": failed} if failed else {}),
            }
        )
    return rows


def fastest(times: dict[str, float], count: int = 2) -> str:
    """The first few of the candidates by their times."""
    return ", ".join(f"{name}: {times[name]}" for name in sorted(times, key=times.__getitem__)[:count])


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each product: times, the share of the floor, and which config is best."""
    print(f"{'weights':16} {'N':>6} {'K':>5} {'M':>4} {'torch us':>8} {'best us':>8} {'floor':>5}  best")
    for row in rows:
        overlapped = "" if row["overlapped_us"] is None else f", overlapped {row['overlapped_us']:.2f}"
        print(
            f"{row['weights']:16} {row['n']:6} {row['k']:5} {row['m']:4} {row['torch_us']:8.2f} "
            f"{row['best_us']:8.2f} {row['best_share_of_floor']:5.0%}  {row['best']}{overlapped}"
        )


def main() -> None:
    arguments = record.parser(__doc__).parse_args()
    compile_all()
    bench = Bench()
    rows = []
    for name in SHAPES:
        rows += measure_shape(bench, name, DECODE + ((PREFILL,) if name in PREFILL_SHAPES else ()))
    record.write(arguments.json, {"device": torch.cuda.get_device_name(), "products": rows})
    failed = {error for row in rows for error in row.get("failed", {}).values()}
    print(*sorted(failed), sep="\n")
    print_table(rows)


if __name__ == "__main__":
    main()
