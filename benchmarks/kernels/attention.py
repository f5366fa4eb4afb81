"""Paged attention on a GPU: decode against the bandwidth of a copy, prefill against what torch ships.

Decode is measured over numbers of splits and configurations, so that the defaults can be chosen from one run;
its bytes are the contexts' keys and values, read once. Prefill is compared with flash and cuDNN attention on
keys and values that lie contiguously, and with gathering them from the pool first. Every time is the median
of several runs over inputs larger than the L2 cache, launched back to back. Heads of 128, bf16, blocks of 16.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from engine.kernels.paged_attention.decode import (
    DecodeConfig,
    DecodeWorkspace,
    decode_splits,
    paged_decode_attention,
    split_workspace,
)
from engine.kernels.paged_attention.prefill import (
    PrefillConfig,
    paged_prefill_attention,
    prefill_block_q,
    prefill_config,
    prefill_tiles,
)
from engine.kernels.paged_attention.prefix import prefix_splits, shared_prefix_attention

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 16
QUERY_HEADS = (32, 16)
BATCH_SIZES = (1, 16, 64, 256)
CONTEXTS = (128, 512, 2048, 7000)
COLUMNS = -(-max(CONTEXTS) // BLOCK_SIZE)
SCALE = HEAD_DIM**-0.5
DECODE_CONFIGS = (
    DecodeConfig(64, 4, 3),
    DecodeConfig(64, 4, 4),
    DecodeConfig(64, 2, 3),
    DecodeConfig(32, 4, 4),
    DecodeConfig(32, 2, 4),
    DecodeConfig(128, 4, 2),
)
PREFILL_CONFIGS = (
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 128, 8, 3),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(64, 64, 4, 2),
    PrefillConfig(64, 64, 4, 3),
)
# (requests, new tokens of each, context before them)
PREFILLS = ((4, 2048, 0), (1, 7000, 0), (8, 512, 2048))
# Decodes whose contexts begin alike: tokens that they share, tokens of their own.
SHARED_TOKENS, OWN_TOKENS = 2048, 96
RUNS = 5
# Host time that a launch may take and still be in the queue before the device comes to it.
LAUNCH_CYCLES = 150_000
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Keys and values, and 256 requests whose blocks are scattered over them."""

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor

    @staticmethod
    def of(num_rows: int, num_columns: int = COLUMNS) -> Pool:
        """A pool of random content; the table always has COLUMNS, of which `num_columns` are filled."""
        blocks = num_rows * num_columns
        shape = (blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        table = torch.zeros((num_rows, COLUMNS), device="cuda", dtype=torch.int32)
        table[:, :num_columns] = torch.randperm(blocks, device="cuda").view(num_rows, num_columns)
        return Pool(key, value, table)

    def gathered(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these rows' first tokens, each [rows * length, HK, D]."""
        blocks = self.block_table[rows, : -(-length // BLOCK_SIZE)].flatten()
        key, value = (
            cache.index_select(0, blocks)
            .view(len(rows), -1, NUM_KV_HEADS, HEAD_DIM)[:, :length]
            .reshape(-1, NUM_KV_HEADS, HEAD_DIM)
            for cache in (self.key, self.value)
        )
        return key, value


def integers(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).cuda()


def median_us(launches: list[Callable[[], Any]], count: int) -> float:
    """Microseconds of one launch, of `count` in a row, the given ones in turns."""
    turns = cycle(launches)
    for launch in islice(turns, 3):
        launch()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LAUNCH_CYCLES * count)
        start.record()
        for launch in islice(turns, count):
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times)


def copy_gb_per_s() -> float:
    """Bandwidth of a large copy within the device, bytes read and bytes written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us([lambda: target.copy_(source)], 4) / 1e3


def launch_decode(
    pool: Pool, rows: torch.Tensor, context: int, query: torch.Tensor, workspace: DecodeWorkspace, **how: Any
) -> Callable[[], torch.Tensor]:
    seq_lens, out = torch.full_like(rows, context), torch.full_like(query, torch.nan)
    return lambda: paged_decode_attention(
        query,
        pool.key,
        pool.value,
        block_table=pool.block_table,
        rows=rows,
        seq_lens=seq_lens,
        scale=SCALE,
        out=out,
        workspace=workspace,
        **how,
    )


def launch_prefill(
    pool: Pool,
    rows: torch.Tensor,
    counts: list[int],
    context: int,
    query: torch.Tensor,
    config: PrefillConfig,
    **how: Any,
) -> Callable[[], torch.Tensor]:
    """Chunks of `counts` tokens, each after `context` ones."""
    seq_lens = np.array(counts) + context
    block_q = prefill_block_q(query.shape[1], NUM_KV_HEADS, config)
    tile_request, tile_start = map(integers, prefill_tiles(np.array(counts), seq_lens, block_q))
    starts, lengths = integers(np.cumsum([0, *counts])), integers(seq_lens)
    out = torch.full_like(query, torch.nan)
    return lambda: paged_prefill_attention(
        query,
        pool.key,
        pool.value,
        block_table=pool.block_table,
        rows=rows,
        query_start_loc=starts,
        seq_lens=lengths,
        tile_request=tile_request,
        tile_start=tile_start,
        scale=SCALE,
        out=out,
        config=config,
        **how,
    )


def launch_cascade(
    pool: Pool, rows: torch.Tensor, shared: int, context: int, query: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Decodes whose first `shared` tokens are those of the first row, attended to once."""
    num_seqs, num_heads, _ = query.shape
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    block_m = prefill_config(HEAD_DIM, query.dtype, query.dtype).block_m
    splits = prefix_splits(num_seqs, num_heads, NUM_KV_HEADS, num_sms, block_m)
    shares = num_seqs * (1 + splits)
    workspace = split_workspace(num_seqs, shares, num_heads, NUM_KV_HEADS, HEAD_DIM, query.device)
    prefix_len, prefix_lens = integers([shared]), torch.full_like(rows, shared)
    seq_lens, out = torch.full_like(rows, context), torch.full_like(query, torch.nan)
    inputs = {"block_table": pool.block_table, "scale": SCALE, "num_splits": 1, "workspace": workspace}

    def launch() -> torch.Tensor:
        prefix = shared_prefix_attention(
            query,
            pool.key,
            pool.value,
            prefix_row=rows[:1],
            prefix_len=prefix_len,
            prefix_lens=prefix_lens,
            num_prefix_splits=splits,
            **inputs,
        )
        return paged_decode_attention(
            query, pool.key, pool.value, rows=rows, seq_lens=seq_lens, out=out, prefix=prefix, **inputs
        )

    return launch


def random_query(num_tokens: int, num_heads: int) -> torch.Tensor:
    return torch.randn((num_tokens, num_heads, HEAD_DIM), device="cuda", dtype=torch.bfloat16)


def compile_variant(task: tuple[int, DecodeConfig | PrefillConfig | None]) -> None:
    """Compiles what the benchmark launches, in a process of its own; Triton's cache on disk keeps it.

    A configuration of None stands for the shared prefix.
    """
    num_heads, config = task
    pool, rows = Pool.of(1, 1), integers([0])
    query = random_query(1, num_heads)
    if isinstance(config, PrefillConfig):
        launch_prefill(pool, rows, [1], 0, query, config)()
    elif config is None:
        launch_cascade(pool, rows, 1, 2, query)()
    else:
        for num_splits in (1, 2):
            workspace = split_workspace(1, 2, num_heads, NUM_KV_HEADS, HEAD_DIM, query.device)
            launch_decode(pool, rows, 1, query, workspace, num_splits=num_splits, config=config)()
    torch.cuda.synchronize()


def compile_all() -> None:
    configs = (*PREFILL_CONFIGS, *DECODE_CONFIGS, None)
    tasks = [(heads, config) for heads in QUERY_HEADS for config in configs]
    workers = min(12, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(compile_variant, tasks))


def agree(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; NaN if anything was left unwritten."""
    return round(float((actual.float() - expected.float()).abs().max()), 5)


def decode_candidates(num_seqs: int, num_sms: int) -> list[tuple[DecodeConfig, int]]:
    default = decode_splits(num_seqs, NUM_KV_HEADS, num_sms)
    splits = sorted({max(1, default // 2), default, min(64, 2 * default)}) if num_seqs < 256 else [1]
    return [(config, split) for config in DECODE_CONFIGS for split in splits]


def measure_decode(pool: Pool, num_heads: int, num_seqs: int, context: int, copy: float) -> Outcome:
    """All candidates on one batch; the table's rows take turns, so that the L2 cache does not serve them."""
    num_rows = len(pool.block_table)
    batches = [integers(np.arange(first, first + num_seqs)) for first in range(0, num_rows, num_seqs)]
    query = random_query(num_seqs, num_heads)
    workspace = split_workspace(num_seqs, num_seqs * 64, num_heads, NUM_KV_HEADS, HEAD_DIM, query.device)
    num_bytes = 2 * 2 * num_seqs * context * NUM_KV_HEADS * HEAD_DIM + 2 * query.nbytes
    count = max(4, min(24, int(3e9 / num_bytes)))
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    times, expected = {}, None
    for config, num_splits in decode_candidates(num_seqs, num_sms):
        launches = [
            launch_decode(pool, rows, context, query, workspace, num_splits=num_splits, config=config)
            for rows in batches
        ]
        actual = launches[0]()
        expected = actual if expected is None else expected
        assert agree(actual, expected) < 0.02, (config, num_splits)
        name = f"n{config.block_n} w{config.num_warps} s{config.num_stages} split{num_splits}"
        times[name] = round(median_us(launches, count), 2)
    best = min(times, key=times.__getitem__)
    rate = num_bytes / times[best] / 1e3
    return {
        "best": best,
        "us": times[best],
        "gb_per_s": round(rate),
        "share_of_copy": round(rate / copy, 3),
        "candidates": len(times),
    }


def measure_decode_by_prefill(pool: Pool, num_heads: int, num_seqs: int, context: int) -> float:
    """Microseconds of the same batch as chunks of one token, which makes it independent of the batch."""
    rows = integers(np.arange(num_seqs))
    config = prefill_config(HEAD_DIM, torch.bfloat16, torch.bfloat16)
    query = random_query(num_seqs, num_heads)
    return round(median_us([launch_prefill(pool, rows, [1] * num_seqs, context - 1, query, config)], 4), 1)


def measure_cascade(num_heads: int) -> Outcome:
    """Microseconds of 256 decodes that share a prefix, each reading all of it and by the cascade."""
    context = SHARED_TOKENS + OWN_TOKENS
    pool = Pool.of(256, context // BLOCK_SIZE)
    shared_blocks = SHARED_TOKENS // BLOCK_SIZE
    pool.block_table[:, :shared_blocks] = pool.block_table[:1, :shared_blocks]
    rows, query = integers(np.arange(256)), random_query(256, num_heads)
    workspace = split_workspace(256, 256, num_heads, NUM_KV_HEADS, HEAD_DIM, query.device)
    plain = launch_decode(pool, rows, context, query, workspace, num_splits=1)
    cascade = launch_cascade(pool, rows, SHARED_TOKENS, context, query)
    difference = agree(cascade(), plain())
    assert difference < 0.02, difference
    return {
        "plain_us": round(median_us([plain], 8), 1),
        "cascade_us": round(median_us([cascade], 8), 1),
        "difference": difference,
    }


def torch_prefills(
    pool: Pool, rows: torch.Tensor, count: int, context: int, query: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """What torch ships for the same chunks. cuDNN's causal mask assumes that there is no earlier context."""
    length = count + context
    key, value = pool.gathered(rows, length)
    starts_q, starts_k = (integers(np.arange(len(rows) + 1) * step) for step in (count, length))

    def flash(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._flash_attention_forward(
            query, k, v, starts_q, starts_k, count, length, 0.0, True, False, scale=SCALE
        )[0]

    def cudnn_varlen() -> torch.Tensor:
        return torch.ops.aten._cudnn_attention_forward(
            query, key, value, None, starts_q, starts_k, count, length, False, 0.0, True, False, scale=SCALE
        )[0]

    def cudnn_dense() -> torch.Tensor:
        q, k, v = (x.view(len(rows), -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).reshape(query.shape)

    return {
        "torch flash": lambda: flash(key, value),
        "torch gather and flash": lambda: flash(*pool.gathered(rows, length)),
        "torch cudnn varlen": cudnn_varlen,
        "torch cudnn dense": cudnn_dense,
    }


def measure_prefill(pool: Pool, num_heads: int, num_seqs: int, count: int, context: int) -> Outcome:
    """TFLOP/s (the causal half counted) of every way, and how far each is from the first of our own."""
    rows = integers(np.arange(num_seqs))
    query = random_query(num_seqs * count, num_heads)
    ways = {
        f"m{c.block_m} n{c.block_n} w{c.num_warps} s{c.num_stages}": launch_prefill(
            pool, rows, [count] * num_seqs, context, query, c
        )
        for c in PREFILL_CONFIGS
    }
    ways |= torch_prefills(pool, rows, count, context, query)
    visible = num_seqs * sum(range(context + 1, context + count + 1))
    flops = 4 * HEAD_DIM * num_heads * visible
    results: Outcome = {}
    expected = None
    for name, way in ways.items():
        try:
            actual = way()
            expected = actual.clone() if expected is None else expected
            difference = agree(actual, expected)
            time_us = median_us([way], 4)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        tflops = round(flops / time_us / 1e6, 1)
        results[name] = {"us": round(time_us, 1), "tflop_per_s": tflops, "difference": difference}
    return results


def table(results: Outcome) -> str:
    """What a person reads: the best of each decode, all of prefill."""
    lines = []
    for case, outcome in results["decode"].items():
        lines.append(
            f"{case:28} {outcome['us']:9.1f} us {outcome['gb_per_s']:6d} GB/s "
            f"{outcome['share_of_copy']:6.1%}  {outcome['best']}"
        )
    for case, time_us in results["decode_by_prefill_us"].items():
        lines.append(f"{case:28} {time_us:9.1f} us as chunks of one token")
    for case, told in results["shared_prefix"].items():
        lines.append(
            "{0:28} {plain_us:9.1f} us plain, {cascade_us:9.1f} us by the cascade".format(case, **told)
        )
    for case, ways in results["prefill"].items():
        lines.append(case)
        for way, told in ways.items():
            if isinstance(told, dict):
                told = "{us:9.1f} us {tflop_per_s:6.1f} TFLOP/s, differs by {difference}".format(**told)
            lines.append(f"  {way:24} {told}")
    return "\n".join(lines)


def measure() -> Outcome:
    torch.manual_seed(0)
    compile_all()
    copy = copy_gb_per_s()
    pool = Pool.of(max(BATCH_SIZES))
    shapes = {heads: f"{heads}/{NUM_KV_HEADS}/{HEAD_DIM}" for heads in QUERY_HEADS}
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_per_s": round(copy),
        "decode": {
            f"{shape} S={num_seqs} ctx={context}": measure_decode(pool, heads, num_seqs, context, copy)
            for heads, shape in shapes.items()
            for num_seqs in BATCH_SIZES
            for context in CONTEXTS
        },
        "decode_by_prefill_us": {
            f"{shape} S=256 ctx={context}": measure_decode_by_prefill(pool, heads, 256, context)
            for heads, shape in shapes.items()
            for context in (512, 2048)
        },
        "shared_prefix": {
            f"{shape} S=256 {SHARED_TOKENS} + {OWN_TOKENS}": measure_cascade(heads)
            for heads, shape in shapes.items()
        },
        "prefill": {
            f"{shape} {num_seqs} x {count} after {context}": measure_prefill(
                pool, heads, num_seqs, count, context
            )
            for heads, shape in shapes.items()
            for num_seqs, count, context in PREFILLS
        },
    }


if __name__ == "__main__":
    arguments = record.parser(__doc__).parse_args()
    outcome = measure()
    record.write(arguments.json, outcome)
    print(table(outcome))
