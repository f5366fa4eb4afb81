"""Products with quantized weights of llama8b's shapes: ours beside torch's in bf16, and the floor.

    python -m benchmarks.kernels.quantized [--json FILE] [--tune] [--kinds KIND,...] [--shapes NAME,...]
        [--tokens NUMBER,...]

Each product is timed in a CUDA graph of many calls that take turns over copies of the weights which do not
fit in the L2 cache. The floor is the larger of the bytes at the measured copy bandwidth and the operations at
the rate of matrix products in bf16, or in int8 for "w8a8". "chosen" is what serving takes. With --tune every
candidate is timed, and the best are printed in the form of engine/kernels/quantized/measured.py. A candidate
that fails or differs from torch's product of the dequantized weights is told with what was wrong.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.kernels.linear import ARITHMETIC, BANDWIDTH, ROTATED_BYTES
from engine.cuda.quantized_products import Int8Products, WordProducts, cuda_layout_products
from engine.kernels.linear.tiled import TileConfig
from engine.kernels.quantized.choice import choose_int8, choose_product, choose_words, one_token_rows
from engine.kernels.quantized.rows import WordRowsConfig
from engine.kernels.quantized.tiles import WordConfig
from engine.quant.layouts.base import Layout
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.table import TableWeights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# (N, K)
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
KINDS = ("int4", "int8", "table4", "w8a8")
COMPILERS = 14
DTYPE = torch.bfloat16
# Programs, for each of 132 multiprocessors.
ONE, TWO, THREE, FOUR, SIX, EIGHT, TWELVE = 132, 264, 396, 528, 792, 1056, 1584

Config = WordConfig | WordRowsConfig | TileConfig | None


def word_candidates(kind: str, m: int) -> list[Config]:
    """The plausible configs for m tokens."""
    if m == 1 and kind in ("int4", "int8"):
        return [
            WordRowsConfig(block_n, num_warps, overlap)
            for block_n in (8, 16, 32)
            for num_warps in (2, 4, 8, 16)
            for overlap in (False, True)
        ]
    if m <= 16:
        rows = 8 if m <= 8 else 16
        found: list[Config] = [
            WordConfig(rows, 64, 4, 5, FOUR),
            WordConfig(rows, 128, 4, 4, THREE),
            WordConfig(rows, 128, 4, 4, FOUR),
            WordConfig(rows, 64, 2, 5, EIGHT),
            WordConfig(rows, 64, 2, 4, SIX),
            WordConfig(rows, 128, 4, 4, TWO),
        ]
        if rows == 8:
            found += [WordConfig(8, 32, 1, 5, TWELVE)]
        return [*found, WordConfig(rows, 128, 8, 4, TWO)] if kind == "table4" else found
    match m:
        case 32:
            return [
                WordConfig(32, 64, 4, 4, FOUR),
                WordConfig(32, 64, 2, 4, SIX),
                WordConfig(32, 128, 4, 4, TWO),
                WordConfig(32, 128, 4, 3, THREE),
            ]
        case 64:
            return [
                WordConfig(64, 64, 4, 4, TWO),
                WordConfig(64, 64, 4, 3, THREE),
                WordConfig(64, 128, 8, 4, TWO),
                WordConfig(64, 128, 8, 3),
            ]
        case 128:
            return [
                WordConfig(128, 64, 4, 3, TWO),
                WordConfig(128, 64, 4, 2, THREE),
                WordConfig(128, 128, 8, 3, ONE),
                WordConfig(128, 128, 8, 3),
            ]
        case 256:
            return [
                WordConfig(256, 128, 8, 3, ONE),
                WordConfig(256, 64, 4, 3, ONE),
                WordConfig(128, 128, 8, 3, ONE),
                WordConfig(128, 128, 8, 3),
                WordConfig(128, 64, 4, 3, TWO),
            ]
    return [WordConfig(256, 128, 8, 3, ONE), WordConfig(256, 128, 8, 3), WordConfig(128, 128, 8, 3), None]


def int8_candidates(m: int) -> list[Config]:
    """The plausible configs for m tokens of 8 bits."""
    if m <= 32:
        tile = TileConfig(max(16, m), 64, 128, 4, 6, transposed=True)
        return [
            replace(tile, programs=TWO),
            replace(tile, programs=FOUR, num_stages=4),
            replace(tile, block_k=256, num_stages=4, programs=TWO),
            replace(tile, block_k=256, num_stages=4, block_n=128, programs=132),
        ]
    if m <= 128:
        return [
            TileConfig(64, 64, 128, 4, 5, transposed=True, programs=TWO),
            TileConfig(64, 128, 128, 4, 4, programs=TWO),
            TileConfig(128, 128, 128, 8, 4, programs=132),
            TileConfig(128, 64, 128, 4, 4),
            TileConfig(128, 128, 128, 8, 4),
        ]
    return [
        TileConfig(128, 128, 128, 8, 4),
        TileConfig(128, 256, 128, 8, 3),
        TileConfig(256, 128, 128, 8, 3),
        TileConfig(128, 256, 128, 8, 4, programs=132),
    ]


def make_layout(kind: str, n: int, k: int) -> Layout:
    """Random weights, as they are before they are prepared."""
    device = torch.device("cuda")

    def words() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (n, k // 8), device=device).int()

    if kind == "int4":
        return PackedGroups(
            bits=4,
            words=words(),
            scales=torch.full((k // 128, n), 0.01, dtype=DTYPE, device=device),
            group_size=128,
            zeros=torch.randint(6, 10, (k // 128, n), dtype=torch.uint8, device=device),
            zero_point=8,
            order=None,
        )
    if kind == "table4":
        return TableWeights(
            words=words(),
            table=torch.linspace(-1, 1, 16, device=device)[None],
            scales=torch.full((k // 64, n), 0.05, device=device),
            group_size=64,
            outliers=None,
        )
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    scales = torch.full((n,), 0.001, device=device)
    if kind == "int8":
        return Int8Groups(
            codes=codes, scales=scales[None], group_size=k, zeros=None, zero_point=0, order=None
        )
    return Int8Channels(codes=codes, scales=scales, input_scale=None, input_zero=None, sums=None)


@dataclass
class Forced:
    """Has products take one config, whatever is measured.

    Attributes:
        config: the config; "chosen" for what serving takes.
    """

    config: Config | str = "chosen"


def products(forced: Forced) -> Callable[[Layout, torch.Tensor], torch.Tensor]:
    """Multiplies by a prepared layout with the config that is forced."""
    device = torch.device("cuda")
    own = cuda_layout_products(device, deterministic=False)

    def words(self: WordProducts, matrix: Any, x: torch.Tensor) -> WordConfig | WordRowsConfig | None:
        if isinstance(forced.config, str):
            return choose_product(matrix, len(x))
        assert not isinstance(forced.config, TileConfig)
        return forced.config

    def int8(self: Int8Products, m: int, n: int, k: int) -> TileConfig:
        if isinstance(forced.config, str):
            return choose_int8(m, n, k)
        assert isinstance(forced.config, TileConfig)
        return forced.config

    WordProducts.choose, Int8Products.choose = words, int8  # type: ignore[method-assign]
    return lambda layout, x: own.multiply(layout, x, None)


def prepare(kind: str, n: int, k: int) -> Layout:
    """Random weights as serving has them."""
    return cuda_layout_products(torch.device("cuda"), deterministic=False).prepared(make_layout(kind, n, k))


def candidates(kind: str, m: int) -> list[Config]:
    """Of a kind of weights, for m tokens."""
    return int8_candidates(m) if kind == "w8a8" else word_candidates(kind, m)


def describe(config: Config) -> str:
    """A few characters that say which config it is."""
    match config:
        case WordConfig():
            tile = f"{config.block_m}x{config.block_n}"
        case WordRowsConfig():
            return f"rows {config.block_n} w{config.num_warps}{' early' * config.overlap}"
        case TileConfig():
            order = "nm" if config.transposed else "mn"
            tile = f"{order} {config.block_m}x{config.block_n}x{config.block_k}"
        case _:
            return "dequantized"
    shares = f" p{config.programs}" if config.programs else ""
    return f"{tile} w{config.num_warps} s{config.num_stages}{shares}"


def chosen(kind: str, m: int, n: int, k: int) -> Config:
    """What serving takes."""
    if kind == "w8a8":
        return choose_int8(m, n, k)
    if m == 1 and kind in ("int4", "int8"):
        return one_token_rows(kind, n, k)
    return choose_words(kind, m, n, k)


def compile_one(job: tuple[str, int, Config]) -> str:
    """Fills Triton's cache on disk. What fails is met again in the timing."""
    kind, m, config = job
    try:
        forced = Forced(config)
        multiply = products(forced)
        for n, k in {(256, 4096), (256, 14336)}:
            layout = prepare(kind, n, k)
            multiply(layout, torch.zeros(m, k, dtype=DTYPE, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{kind} {m} {config}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_all(kinds: list[str], names: list[str], tokens: list[int], *, tune: bool) -> None:
    """Compiles every config, several at a time: one after the other they would take minutes."""
    jobs: dict[Any, tuple[str, int, Config]] = {}
    for kind in kinds:
        for m in tokens:
            configs = [chosen(kind, m, *SHAPES[name]) for name in names]
            for config in [*configs, *(candidates(kind, m) if tune else [])]:
                jobs[kind, config] = (kind, min(m, 512), config)
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for failed in filter(None, pool.map(compile_one, jobs.values())):
            print(failed, flush=True)


def seconds_of(call: Callable[[int], Any], copies: int, budget: float = math.inf) -> float:
    """Seconds of one call, which is given the number of a copy; rough if it is far above the budget."""
    call(0)
    calls = copies * math.ceil(8 / copies)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index % copies)
    graph.replay()
    rough = _replay(graph, 1) / calls
    if rough > 1.5 * budget:
        return rough
    replays = max(1, math.ceil(1.5e-3 / (rough * calls)))
    return statistics.median(_replay(graph, replays) for _ in range(5)) / calls


def _replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays


def bf16_seconds(n: int, k: int, tokens: list[int]) -> dict[int, float]:
    """torch's product in bf16, by the number of tokens."""
    copies = max(1, math.ceil(ROTATED_BYTES / (2 * n * k)))
    weights = torch.empty(copies, n, k, dtype=DTYPE, device="cuda").normal_(std=k**-0.5)
    found = {}
    for m in tokens:
        x = torch.randn(m, k, dtype=DTYPE, device="cuda")
        found[m] = seconds_of(lambda index, x=x: F.linear(x, weights[index]), copies)  # type: ignore[misc]
    return found


def measure(
    kind: str,
    name: str,
    multiply: Callable[[Layout, torch.Tensor], torch.Tensor],
    forced: Forced,
    *,
    tokens: list[int],
    tune: bool,
) -> list[dict[str, Any]]:
    """A kind of weights of one shape, for each number of tokens."""
    n, k = SHAPES[name]
    first = prepare(kind, n, k)
    copies = max(1, math.ceil(ROTATED_BYTES / first.num_bytes))
    layouts = [first, *(prepare(kind, n, k) for _ in range(copies - 1))]
    weight = first.weight()
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=DTYPE, device="cuda")
        expected = x.float() @ weight.T
        times: dict[str, float] = {}
        configs: dict[str, Config] = {}
        failed: dict[str, str] = {}
        best = math.inf
        tried: list[Config | str] = ["chosen", *(candidates(kind, m) if tune else [])]
        for config in tried:
            forced.config = config
            key = config if isinstance(config, str) else describe(config)
            try:
                error = float((multiply(first, x).float() - expected).norm() / expected.norm())
                if not error < 2e-2:
                    raise ArithmeticError(f"differs from torch's result by {error:.1e}")
                seconds = seconds_of(lambda index, x=x: multiply(layouts[index], x), copies, best)  # type: ignore[misc]
            except Exception as error:
                failed[key] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
                continue
            times[key] = round(seconds * 1e6, 2)
            if not isinstance(config, str):
                configs[key] = config
                best = min(best, seconds)
        moved, operations = first.num_bytes + 2 * m * (k + n), 2 * m * n * k
        floor = max(moved / BANDWIDTH, operations / ARITHMETIC / (2 if kind == "w8a8" else 1))
        fastest = min(configs, key=lambda key: times[key], default="")
        rows.append(
            {
                "kind": kind,
                "weights": name,
                "n": n,
                "k": k,
                "m": m,
                "floor_us": round(floor * 1e6, 2),
                "chosen_us": times.get("chosen"),
                **({"best": fastest, "best_us": times[fastest], "candidates_us": times} if fastest else {}),
                **({"failed": failed} if failed else {}),
                "config": repr(configs.get(fastest)),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], bf16: dict[int, float]) -> None:
    """One line for each number of tokens."""
    for row in rows:
        m = row["m"]
        took = min(value for value in (row["chosen_us"], row.get("best_us"), math.inf) if value)
        row["bf16_us"] = round(bf16[m] * 1e6, 2)
        row["took_us"] = took
        row["share_of_floor"] = round(row["floor_us"] / took, 3)
        row["times_bf16"] = round(row["bf16_us"] / took, 2)
        told = f" best {row['best']} {row['best_us']}" if "best" in row else ""
        print(
            f"{row['kind']:7} {row['weights']:8} {m:5} bf16 {row['bf16_us']:9.2f} "
            f"chosen {row['chosen_us'] or 0:9.2f} "
            f"floor {row['floor_us']:9.2f} ({row['share_of_floor']:4.0%}, x{row['times_bf16']:.2f}){told}",
            flush=True,
        )
        for key, text in row.get("failed", {}).items():
            print(f"    {key}: {text}")


def print_measured(rows: list[dict[str, Any]]) -> None:
    """What measured.py would hold."""
    by_weights: dict[Any, list[tuple[int, str]]] = {}
    for row in rows:
        entries = by_weights.setdefault((row["kind"], row["n"], row["k"]), [])
        if entries and entries[-1][1] == row["config"]:
            entries.pop()
        entries.append((row["m"], row["config"]))
    for key, entries in by_weights.items():
        print(f"{key}: (")
        for most, config in entries:
            print(f"    ({most}, {config}),")
        print("),")


def print_summary(rows: list[dict[str, Any]]) -> None:
    """For each kind of weights of each shape a column for each number of tokens: microseconds, the share of
    the floor, and how much faster than bf16."""
    by_weights: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_weights.setdefault((row["kind"], row["weights"]), []).append(row)
    tokens = dict.fromkeys(row["m"] for row in rows)
    print(f"{'tokens':16} " + " ".join(f"{m:>16}" for m in tokens))
    for (kind, name), found in by_weights.items():
        cells = (
            f"{row['took_us']:7.1f} {row['share_of_floor']:3.0%} {row['times_bf16']:4.2f}" for row in found
        )
        print(f"{kind:7} {name:8} " + " ".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="time every candidate")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    arguments = parser.parse_args()
    tokens = [int(each) for each in arguments.tokens.split(",")]
    kinds, names = arguments.kinds.split(","), arguments.shapes.split(",")
    compile_all(kinds, names, tokens, tune=arguments.tune)
    forced = Forced()
    multiply = products(forced)
    rows = []
    for name in names:
        bf16 = bf16_seconds(*SHAPES[name], tokens)
        torch.cuda.empty_cache()
        for kind in kinds:
            found = measure(kind, name, multiply, forced, tokens=tokens, tune=arguments.tune)
            print_rows(found, bf16)
            rows += found
            torch.cuda.empty_cache()
    record.write(arguments.json, {"device": torch.cuda.get_device_name(), "products": rows})
    if arguments.tune:
        print_measured(rows)
    print_summary(rows)


if __name__ == "__main__":
    main()
