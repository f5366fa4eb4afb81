"""FP8 on a GPU: products with the weights of llama8b, and attention over keys and values of 8 bits.

    python -m benchmarks.kernels.fp8 [--json FILE] [--tune] [--tokens N...]

Products are timed with the quantization of their inputs, as the engine computes them: ours with scales for
each output and in blocks of 128 x 128, torch's scaled product (with scales for each token and output), and
torch's product of bf16. From 1,024 tokens on the product alone is timed too, beside torch's alone. As in
linear.py, each is timed in a CUDA graph of many calls that take turns over copies of the weights which do not
fit in the L2 cache, and the floor is the larger of the bytes at the bandwidth of a copy and the operations at
twice the rate of bf16 products. --tune prints what was fastest in the form of engine/kernels/fp8/measured.py.

Attention: 64 decodes of 7,000 tokens each, and 4 prompts of 2,048, over keys and values of bf16 and e4m3.
"""

from __future__ import annotations

import math
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.kernels import attention
from benchmarks.kernels.linear import (
    ARITHMETIC,
    BANDWIDTH,
    COMPILERS,
    ONE_PER_SM,
    ROTATED_BYTES,
    SHAPES,
    TWO_PER_SM,
    Bench,
)
from benchmarks.kernels.linear import (
    describe as describe_plain,
)
from engine.kernels.fp8.choice import Config, multiply_fp8, torch_product
from engine.kernels.fp8.e4m3 import LARGEST
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.fp8.one_token import OneTokenConfig
from engine.kernels.fp8.quantize import quantize
from engine.kernels.fp8.tiled import fp8_tiles
from engine.kernels.linear.choice import choose_linear, linear
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig
from engine.kernels.paged_attention.decode import DecodeConfig, decode_config, split_workspace
from engine.kernels.paged_attention.prefill import PrefillConfig, prefill_config

NAMES = ("llama8b qkv", "llama8b o", "llama8b gate_up", "llama8b down")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
# From so many tokens on products are compared without quantization too.
ALONE = 1024
BLOCK = 128
LAYOUTS = ("channels", "blocks")
# Of the quantized inputs and weights; the definition is test_fp8_kernels.py's to hold.
LARGEST_ERROR = 6e-2
DECODES, CONTEXT = 64, 7000
PROMPTS = (4, 2048)
DECODE_CONFIGS = (
    DecodeConfig(64, 1, 4),
    DecodeConfig(64, 2, 4),
    DecodeConfig(64, 2, 5),
    DecodeConfig(64, 2, 6),
    DecodeConfig(128, 2, 3),
    DecodeConfig(128, 2, 4),
)
PREFILL_CONFIGS = (
    PrefillConfig(64, 128, 4, 2),
    PrefillConfig(64, 128, 4, 3),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(256, 64, 8, 2),
)


def candidates(m: int, *, in_blocks: bool) -> list[Config]:
    """The plausible configs for m tokens."""
    rows: list[Config] = [RowsConfig(4, 2), RowsConfig(2, 2)] if m == 1 else []
    if m == 1 and not in_blocks:
        rows += [OneTokenConfig(block_n, num_warps) for block_n in (2, 4) for num_warps in (1, 2, 4, 8)]
    # A block's inputs are added up at once.
    return rows + [config for config in _tiles(m) if not in_blocks or config.block_k <= BLOCK]


def _tiles(m: int) -> Iterator[TileConfig]:
    large = TileConfig(64, 128, 128, 4, 4)
    if m <= 32:
        rows = max(16, m)
        deep = TileConfig(rows, 64, 256, 4, 4, transposed=True)
        narrow = TileConfig(rows, 64, 128, 4, 6, transposed=True)
        yield from (deep, replace(deep, programs=ONE_PER_SM))
        yield from (narrow, replace(narrow, programs=TWO_PER_SM))
        yield TileConfig(rows, 128, 128, 4, 5, transposed=True, programs=ONE_PER_SM)
    elif m == 64:
        narrow = TileConfig(64, 64, 128, 4, 6)
        yield from (narrow, replace(narrow, transposed=True), replace(narrow, programs=TWO_PER_SM), large)
    elif m <= 256:
        yield TileConfig(128, 64, 128, 4, 5)
        yield from (large, replace(large, num_stages=3))
        yield TileConfig(128, 128, 128, 8, 4, programs=ONE_PER_SM)
    else:
        # The second and the third: three programs on a multiprocessor.
        yield from (large, replace(large, num_stages=3))
        yield TileConfig(128, 64, 128, 4, 3)
        yield TileConfig(128, 128, 128, 8, 4)


def to_matrix(weight: torch.Tensor, layout: str) -> Fp8Matrix:
    """A matrix [N, K], its sizes multiples of 128, rounded to e4m3."""
    n, k = weight.shape
    if layout == "channels":
        scales = weight.float().abs().amax(1) / LARGEST
        codes = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
        return Fp8Matrix(codes, scales, input_group=k)
    tiles = weight.float().view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scales = tiles.abs().amax((1, 3)) / LARGEST
    codes = (tiles / scales[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
    return Fp8Matrix(codes, scales, (BLOCK, BLOCK), BLOCK)


def copies_of(matrix: Fp8Matrix) -> list[Fp8Matrix]:
    """The matrix as often as no cache holds."""
    count = max(1, math.ceil(ROTATED_BYTES / matrix.codes.nbytes))
    return [matrix, *(replace(matrix, codes=matrix.codes.clone()) for _ in range(count - 1))]


def make_workspace(device: torch.device) -> ShareWorkspace:
    """Enough for every candidate and all weights."""
    return ShareWorkspace.make(device, tile_elements=TWO_PER_SM * 128 * 128, tiles=1 << 15)


@dataclass(frozen=True)
class Weights:
    """One layer's matrix in every form, several copies of each."""

    plain: list[torch.Tensor]
    layouts: dict[str, list[Fp8Matrix]]


class Fp8Bench(Bench):
    """See Bench."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = make_workspace(self.device)

    def make_weights(self, n: int, k: int) -> Weights:
        """Random ones."""
        plain = self.weights(n, k)
        return Weights(plain, {layout: copies_of(to_matrix(plain[0], layout)) for layout in LAYOUTS})

    def best(
        self, x: torch.Tensor, weights: Weights, layout: str, failed: dict[str, str]
    ) -> dict[Config | None, float]:
        """Seconds of each candidate, quantization included; what fails or is wrong is noted."""
        times: dict[Config | None, float] = {}
        expected = F.linear(x, weights.plain[0]).float()
        for config in candidates(x.shape[0], in_blocks=layout == "blocks"):
            overlapping = replace(config, overlap=True)

            def call(matrix: Any, config: Config = overlapping) -> torch.Tensor:
                return multiply_fp8(x, matrix, config=config, workspace=self.shares)

            try:
                product = call(weights.layouts[layout][0]).float()
                error = float((product - expected).norm() / expected.norm())
                if not error < LARGEST_ERROR:
                    raise ArithmeticError(f"differs from the product of bf16 by {error:.1e}")
                budget = min(times.values(), default=math.inf)
                times[config] = self.time(call, weights.layouts[layout], budget)
            except Exception as error:
                failed[f"{layout} {describe(config)}"] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
        return times

    def alone(self, x: torch.Tensor, matrices: list[Fp8Matrix], config: Config | None) -> float:
        """Seconds of the product of inputs that are quantized; None for torch's."""
        codes, scales = quantize(x, matrices[0].input_group)

        def call(matrix: Any) -> torch.Tensor:
            if config is None:
                return torch_product(codes, scales, matrix, None, x.dtype)
            assert isinstance(config, TileConfig)
            return fp8_tiles(codes, scales, matrix, dtype=x.dtype, config=config, workspace=self.shares)

        call(matrices[0])
        return self.time(call, matrices, math.inf)


def measure(bench: Fp8Bench, name: str, weights: Weights, m: int) -> dict[str, Any]:
    """Everything about m tokens times one layer's weights."""
    n, k = SHAPES[name]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=bench.device)
    channels = weights.layouts["channels"]

    def scaled(matrix: Any) -> torch.Tensor:
        return torch_product(*quantize(x, k), matrix, None, x.dtype)

    plain_s = bench.product(x, weights.plain, None, math.inf)
    own = choose_linear(m, n, k)
    if own is not None:
        plain_s = min(plain_s, bench.time(_plain(bench, x, own), weights.plain, math.inf))
    failed: dict[str, str] = {}
    times: dict[str, dict[Config | None, float]] = {}
    for layout in LAYOUTS:
        times[layout] = bench.best(x, weights, layout, failed)
    try:
        scaled(channels[0])
        times["channels"][None] = bench.time(scaled, channels, math.inf)
    except RuntimeError as error:
        failed["torch"] = str(error)[:200]
    moved, operations = n * k + 2 * (m * k + m * n), 2 * m * n * k
    floor = max(moved / BANDWIDTH, operations / (2 * ARITHMETIC))
    row = {
        "weights": name,
        "m": m,
        "n": n,
        "k": k,
        "bf16_us": _us(plain_s),
        "torch_us": _us(times["channels"].get(None, math.nan)),
    }
    for layout, found in times.items():
        config = min(found, key=found.__getitem__)
        row |= {
            f"{layout}_us": _us(found[config]),
            f"{layout}_best": describe(config),
            f"{layout}_config": config,
            f"{layout}_share_of_floor": round(floor / found[config], 3),
            f"{layout}_next": _next(found),
        }
    if m >= ALONE:
        row["torch_alone_us"] = _us(bench.alone(x, channels, None))
        for layout in LAYOUTS:
            own_times = {config: t for config, t in times[layout].items() if config is not None}
            config = min(own_times, key=own_times.__getitem__)
            seconds = bench.alone(x, weights.layouts[layout], config)
            row[f"{layout}_alone_us"] = _us(seconds)
            row[f"{layout}_alone_tflop_per_s"] = round(operations / seconds / 1e12)
            row[f"{layout}_alone"] = describe(config)
    return row | ({"failed": failed} if failed else {})


def _plain(bench: Bench, x: torch.Tensor, config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(w: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = linear(x, w, config=config, workspace=bench.workspace)
        return product

    call(torch.zeros(config.block_n, x.shape[1], dtype=x.dtype, device=x.device))
    return call


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _next(times: dict[Config | None, float]) -> str:
    """The three fastest."""
    order = sorted(times, key=times.__getitem__)[:3]
    return ", ".join(f"{describe(config)}: {_us(times[config])}" for config in order)


def attend() -> list[dict[str, Any]]:
    """Decodes and prompts over both kinds of keys and values."""
    results = []
    pool = attention.Pool.of(DECODES)
    scales = torch.ones(2, device="cuda")
    small = replace(pool, key=pool.key.to(torch.float8_e4m3fn), value=pool.value.to(torch.float8_e4m3fn))
    rows = attention.integers(range(DECODES))
    heads, channels = attention.QUERY_HEADS[0], attention.HEAD_DIM
    query = torch.randn(DECODES, heads, channels, device="cuda", dtype=torch.bfloat16)
    workspace = split_workspace(DECODES, DECODES, heads, attention.NUM_KV_HEADS, channels, query.device)
    chosen = {
        each.key.dtype: decode_config(channels, each.key.dtype, DECODES * attention.NUM_KV_HEADS)
        for each in (pool, small)
    }
    moved = 2 * DECODES * CONTEXT * attention.NUM_KV_HEADS * channels
    for own_pool, kv_scales, width in ((pool, None, 2), (small, scales, 1)):
        for config in (chosen[own_pool.key.dtype], *(DECODE_CONFIGS if own_pool is small else ())):
            us = _launch_us(
                partial(
                    attention.launch_decode, own_pool, rows, CONTEXT, query, workspace,
                    num_splits=1, kv_scales=kv_scales, config=config,
                )
            )  # fmt: skip
            results.append(
                {
                    "what": f"decode {DECODES} x {CONTEXT}",
                    "kv": "bf16" if width == 2 else "e4m3",
                    "config": str(config),
                    "us": us,
                    "gb_per_s": round(moved * width / us / 1e3) if us else None,
                }
            )
    count, length = PROMPTS
    query = torch.randn(count * length, heads, channels, device="cuda", dtype=torch.bfloat16)
    operations = 4 * count * length * length / 2 * heads * channels
    for own_pool, kv_scales in ((pool, None), (small, scales)):
        prefilling = prefill_config(channels, query.dtype, own_pool.key.dtype)
        for prefill in (prefilling, *(PREFILL_CONFIGS if own_pool is small else ())):
            us = _launch_us(
                partial(
                    attention.launch_prefill, own_pool, rows[:count], [length] * count, 0, query, prefill,
                    kv_scales=kv_scales,
                )
            )  # fmt: skip
            results.append(
                {
                    "what": f"prompts {count} x {length}",
                    "kv": "bf16" if own_pool is pool else "e4m3",
                    "config": str(prefill),
                    "us": us,
                    "tflop_per_s": round(operations / us / 1e6) if us else None,
                }
            )
    return results


def _launch_us(make: Callable[[], Callable[[], Any]]) -> float | None:
    """None where it cannot be launched."""
    try:
        launch = make()
        launch()
        torch.cuda.synchronize()
        return round(attention.median_us([launch], 8), 1)
    except Exception as error:
        print(f"{type(error).__name__}: {error}"[:200])
        torch.cuda.synchronize()
        return None


def compile_one(job: tuple[Config, int, int, str]) -> None:
    """Fills Triton's cache on disk with what a config needs. What fails is met again in the timing."""
    config, m, k, layout = job
    x = torch.ones(m, k, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(512, k, dtype=torch.bfloat16, device="cuda")
    try:
        multiply_fp8(
            x,
            to_matrix(weight, layout),
            config=replace(config, overlap=True),
            workspace=make_workspace(x.device),
        )
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{layout} {describe(config)}: {type(error).__name__}: {error}"[:200])


def compile_all(tokens: Sequence[int]) -> None:
    """Compiles every candidate for these numbers of tokens, several at a time."""
    jobs: dict[Any, tuple[Config, int, int, str]] = {}
    for layout in LAYOUTS:
        for m in tokens:
            for name in NAMES:
                k = SHAPES[name][1]
                for config in candidates(m, in_blocks=layout == "blocks"):
                    # A kernel of tiles is one for all m, k and numbers of programs.
                    if isinstance(config, RowsConfig | OneTokenConfig):
                        jobs[config, m, k, layout] = (config, m, k, layout)
                    else:
                        key = replace(config, programs=min(1, config.programs)), layout
                        jobs.setdefault(key, (config, min(m, 512), k, layout))
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs.values()))


def tuned(rows: list[dict[str, Any]], layout: str) -> str:
    """What was fastest, in the form of measured.py."""
    lines = []
    for name in NAMES:
        own = [row for row in rows if row["weights"] == name]
        entries: list[tuple[int, Config | None]] = []
        for row in own:
            config = row[f"{layout}_config"]
            if entries and entries[-1][1] == config:
                entries.pop()
            entries.append((row["m"], config))
        lines.append(f"    # {name}\n    {SHAPES[name]}: (")
        lines += [f"        ({most}, {_code(config)})," for most, config in entries]
        lines.append("    ),")
    return f"{layout.upper()}: Table = {{\n" + "\n".join(lines) + "\n}"


def describe(config: Config | None) -> str:
    """A few characters that say which config it is."""
    if isinstance(config, OneTokenConfig):
        return f"one {config.block_n} w{config.num_warps}"
    return describe_plain(config)


def _code(config: Config | None) -> str:
    match config:
        case OneTokenConfig():
            sizes = f"{config.block_n}, num_warps={config.num_warps}"
            return f"OneTokenConfig({sizes}, overlap=True)"
        case RowsConfig():
            return f"RowsConfig({config.block_n}, num_warps={config.num_warps})"
        case TileConfig():
            tile = f"{config.block_m}, {config.block_n}, {config.block_k}"
            more = ", transposed=True" * config.transposed
            if config.programs:
                more += f", programs={config.programs}"
            warps = f"num_warps={config.num_warps}, num_stages={config.num_stages}"
            return f"TileConfig({tile}, {warps}{more})"
    return "None"


def print_tables(rows: list[dict[str, Any]], attended: list[dict[str, Any]]) -> None:
    """A line for each product, then one for each launch of attention."""
    print(f"{'weights':16} {'M':>5} {'bf16':>8} {'torch':>8} {'chan':>8} floor {'blocks':>8} floor")
    for row in rows:
        alone = ""
        if "torch_alone_us" in row:
            alone = (
                f" | alone: torch {row['torch_alone_us']}, channels {row['channels_alone_us']}"
                f" ({row['channels_alone']}), blocks {row['blocks_alone_us']} ({row['blocks_alone']},"
                f" {row['blocks_alone_tflop_per_s']} TFLOP/s)"
            )
        print(
            f"{row['weights']:16} {row['m']:5} {row['bf16_us']:8.2f} {row['torch_us']:8.2f} "
            f"{row['channels_us']:8.2f} {row['channels_share_of_floor']:5.0%} {row['blocks_us']:8.2f} "
            f"{row['blocks_share_of_floor']:5.0%} {row['channels_best']} / {row['blocks_best']}{alone}"
        )
    for each in attended:
        print(*each.values())


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="print the tables of measured.py")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens")
    arguments = parser.parse_args()
    compile_all(arguments.tokens)
    bench = Fp8Bench()
    rows = []
    for name in NAMES:
        weights = bench.make_weights(*SHAPES[name])
        for m in arguments.tokens:
            try:
                rows.append(measure(bench, name, weights, m))
            except Exception:
                traceback.print_exc()
        del weights
        torch.cuda.empty_cache()
    attended = attend()
    kept = [{key: value for key, value in row.items() if not key.endswith("_config")} for row in rows]
    results = {"device": torch.cuda.get_device_name(), "products": kept, "attention": attended}
    record.write(arguments.json, results)
    failed = {f"{which}: {error}" for row in rows for which, error in row.get("failed", {}).items()}
    print(*sorted(failed), sep="\n")
    print_tables(rows, attended)
    if arguments.tune:
        print(*(tuned(rows, layout) for layout in LAYOUTS), sep="\n\n")


if __name__ == "__main__":
    main()
