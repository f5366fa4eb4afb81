"""The Triton kernels of paged attention against their definition, on random batches in a poisoned pool.

Without a GPU they run in Triton's interpreter: small shapes, and no bf16, which it computes wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels.paged_attention.decode import (
    DecodeConfig,
    decode_config,
    decode_splits,
    decode_workspace,
    paged_decode_attention,
    split_workspace,
)
from engine.kernels.paged_attention.naive import naive_paged_attention
from engine.kernels.paged_attention.prefill import (
    PrefillConfig,
    max_prefill_tiles,
    paged_prefill_attention,
    prefill_block_q,
    prefill_config,
    prefill_tiles,
)
from engine.kernels.paged_attention.prefix import (
    prefix_splits,
    prefix_workspace,
    shared_prefix_attention,
)
from tests.kernels.hopper import compile_for_hopper, compile_overlapping
from tests.kernels.interpreter import require_invariant_products

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
DTYPES = list(TOLERANCE) if GPU else [torch.float32, torch.float16]
SCALE = 0.15
# Query heads, key-value heads, head size; dtype.
MODELS = [((8, 2, 128), torch.float16), ((9, 3, 64), torch.float32), ((16, 1, 256), torch.float32)]
if GPU:
    wide = [(32, 8, 128), (16, 8, 128), (9, 3, 64), (32, 8, 64), (8, 1, 80), (4, 4, 96), (16, 2, 256)]
    MODELS += [(heads, torch.bfloat16) for heads in wide]
else:
    MODELS += [((8, 1, 80), torch.float32), ((4, 4, 96), torch.float32)]


@dataclass(frozen=True)
class Case:
    """Requests in a pool that is NaN wherever no context lies. Lengths of 0 are padding.

    Attributes:
        query: [T, H, D], a strided view as a fused projection leaves it.
        rows: [S]; block_table: [R, B], its rows in another order than the requests.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    rows: torch.Tensor
    counts: list[int]
    seq_lens: list[int]

    @property
    def query_start_loc(self) -> list[int]:
        return [0, *np.cumsum(self.counts).tolist()]

    def poisoned_out(self) -> torch.Tensor:
        return torch.full_like(self.query, torch.nan, memory_format=torch.contiguous_format)


def make_case(
    batch: list[tuple[int, int]],
    heads: tuple[int, int, int] = (4, 2, 64),
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A batch of (context, tokens computed), its blocks scattered over the pool."""
    num_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [length for length, _ in batch]
    blocks_of = [-(-length // block_size) for length in seq_lens]
    free = rng.permutation(sum(blocks_of) + 3)
    # Entries past a request's own blocks are not block ids at all.
    table = np.full((len(batch) + 2, max(blocks_of) + 1), 2**31 - 1, dtype=np.int32)
    rows = rng.permutation(len(batch) + 2)[: len(batch)]
    # Keys and values are views of one pool, as the worker's are.
    pool = torch.full((len(free), 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    taken = 0
    for request, (length, used) in enumerate(zip(seq_lens, blocks_of, strict=True)):
        own = free[taken : taken + used]
        taken += used
        table[rows[request], :used] = own
        fresh = torch.randn((length, 2, num_kv_heads, head_dim), generator=generator).to(dtype)
        positions = np.arange(length)
        pool[own[positions // block_size], :, positions % block_size] = fresh
        if length == 0:
            rows[request] = -1
    pool = pool.to(DEVICE)
    counts = [count for _, count in batch]
    total = sum(counts)
    projected = torch.randn((total, num_heads + 2 * num_kv_heads, head_dim), generator=generator)
    return Case(
        query=projected.to(DEVICE, dtype)[:, :num_heads],
        key=pool[:, 0],
        value=pool[:, 1],
        block_table=torch.from_numpy(table).to(DEVICE),
        rows=torch.from_numpy(rows.astype(np.int32)).to(DEVICE),
        counts=counts,
        seq_lens=seq_lens,
    )


def reference(
    case: Case,
    sliding_window: int = 0,
    *,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What naive.py defines, a request at a time, in fp64; zeros for padding."""
    output = torch.zeros(case.query.shape, dtype=torch.float64, device=DEVICE)
    group = case.query.shape[1] // case.key.shape[2]
    block_size = case.key.shape[1]
    for request, seq_len in enumerate(case.seq_lens):
        if seq_len == 0:
            continue
        begin, end = case.query_start_loc[request : request + 2]
        blocks = case.block_table[case.rows[request], : -(-seq_len // block_size)].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:seq_len].double().repeat_interleave(group, 1)
            for cache in (case.key, case.value)
        )
        scores = torch.einsum("thd,nhd->htn", case.query[begin:end].double(), k) * SCALE
        positions = torch.arange(seq_len, device=DEVICE)
        age = positions[seq_len - end + begin :, None] - positions
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            scores -= alibi_slopes.double()[:, None, None] * age
        hidden = (age < 0) | (age >= (sliding_window or seq_len))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, end - begin, 1)), dim=2)
        weights = torch.softmax(scores, dim=2)[:, :, :seq_len]
        output[begin:end] = torch.einsum("htn,nhd->thd", weights, v)
    return output


def assert_matches(actual: torch.Tensor, case: Case, sliding_window: int = 0, **variant: Any) -> None:
    expected = reference(case, sliding_window, **variant)
    # Relative to the size of what is averaged, not of each average.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[actual.dtype])


def decode(
    case: Case,
    num_splits: int,
    sliding_window: int = 0,
    config: DecodeConfig | None = None,
    **variant: Any,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = case.query.shape
    num_kv_heads = case.key.shape[2]
    workspace = split_workspace(num_seqs, num_seqs * num_splits, num_heads, num_kv_heads, head_dim, DEVICE)
    workspace.partials.fill_(torch.nan)
    workspace.log_sums.fill_(torch.nan)
    out = paged_decode_attention(
        case.query,
        case.key,
        case.value,
        block_table=case.block_table,
        rows=case.rows,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=DEVICE),
        scale=SCALE,
        num_splits=num_splits,
        sliding_window=sliding_window,
        out=case.poisoned_out(),
        workspace=workspace,
        config=config,
        **variant,
    )
    assert int(workspace.arrivals.abs().sum()) == 0, "the next launch would never merge"
    return out


def prefill(
    case: Case, sliding_window: int = 0, config: PrefillConfig | None = None, **variant: Any
) -> torch.Tensor:
    num_heads, num_kv_heads = case.query.shape[1], case.key.shape[2]
    block_q = prefill_block_q(
        num_heads,
        num_kv_heads,
        config or prefill_config(case.query.shape[2], case.query.dtype, case.key.dtype),
    )
    tiles = prefill_tiles(np.array(case.counts), np.array(case.seq_lens), block_q)
    padding = np.full(2, -1, dtype=np.int32)
    tile_request, tile_start = (torch.from_numpy(np.append(part, padding)).to(DEVICE) for part in tiles)
    return paged_prefill_attention(
        case.query,
        case.key,
        case.value,
        block_table=case.block_table,
        rows=case.rows,
        query_start_loc=torch.tensor(case.query_start_loc, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=DEVICE),
        tile_request=tile_request,
        tile_start=tile_start,
        scale=SCALE,
        sliding_window=sliding_window,
        out=case.poisoned_out(),
        config=config,
        **variant,
    )


def make_variant(num_heads: int, *names: str) -> dict[str, Any]:
    """What some families' attention does besides, strong enough to change every result."""
    generator = torch.Generator().manual_seed(num_heads)
    slopes, sinks = (torch.rand(2, num_heads, generator=generator) + 0.1).to(DEVICE)
    every = {"sliding_window": 21, "soft_cap": 1.2, "alibi_slopes": slopes, "sinks": 2 * sinks - 1}
    return {name: every[name] for name in names}


VARIANTS = [
    ("soft_cap",),
    ("alibi_slopes",),
    ("sinks",),
    ("sliding_window", "sinks"),
    ("sliding_window", "soft_cap", "alibi_slopes", "sinks"),
]


@pytest.mark.parametrize("names", [(), *VARIANTS], ids=" ".join)
def test_the_reference_equals_the_naive_definition(names: tuple[str, ...]) -> None:
    case = make_case([(40, 4), (7, 1)])
    variant = make_variant(4, *names)
    expected = naive_paged_attention(
        case.query,
        case.key,
        case.value,
        query_start_loc=case.query_start_loc,
        seq_lens=case.seq_lens,
        block_table=case.block_table[case.rows.long()],
        scale=SCALE,
        **variant,
    )
    torch.testing.assert_close(reference(case, **variant), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", VARIANTS, ids=" ".join)
def test_decode_of_every_variant(names: tuple[str, ...], dtype: torch.dtype) -> None:
    case = make_case([(70, 1), (0, 1), (33, 1), (1, 1)], (6, 2, 64), dtype=dtype)
    variant = make_variant(6, *names)
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=3)
    for num_splits in (1, 3):
        assert_matches(decode(case, num_splits, config=config, **variant), case, **variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", VARIANTS, ids=" ".join)
def test_prefill_of_every_variant(names: tuple[str, ...], dtype: torch.dtype) -> None:
    case = make_case([(70, 50), (40, 1), (20, 20)], (6, 2, 64), dtype=dtype)
    variant = make_variant(6, *names)
    config = PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=2)
    assert_matches(prefill(case, config=config, **variant), case, **variant)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(("heads", "dtype"), MODELS, ids=str)
def test_decode_equals_its_definition(
    heads: tuple[int, int, int], dtype: torch.dtype, num_splits: int
) -> None:
    # The longest has several shares even if none is short.
    lengths = [1, 0, 300] if not GPU else [1, 0, 65, 16, 17, 2000, 511, 0, 4096, 300]
    case = make_case([(length, 1) for length in lengths], heads, dtype=dtype, seed=num_splits)
    assert_matches(decode(case, num_splits), case)


@pytest.mark.parametrize("block_size", [8, 128, *([32] if GPU else [])])
@pytest.mark.parametrize(("sliding_window", "num_splits"), [(0, 8), (1, 1), (50, 4)])
def test_decode_with_windows_and_block_sizes(sliding_window: int, num_splits: int, block_size: int) -> None:
    case = make_case([(140, 1), (50, 1), (3, 1)], block_size=block_size, seed=block_size)
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=3)
    assert_matches(decode(case, num_splits, sliding_window, config), case, sliding_window)


@pytest.mark.parametrize(("heads", "dtype"), MODELS, ids=str)
def test_prefill_equals_its_definition(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = [(37, 9), (40, 1), (20, 20)]
    if GPU:
        batch += [(1000, 1000), (2100, 100), (129, 128), (128, 128), (513, 1)]
    case = make_case(batch, heads, dtype=dtype)
    assert_matches(prefill(case), case)


@pytest.mark.parametrize("block_size", [8, 128, *([32] if GPU else [])])
@pytest.mark.parametrize("sliding_window", [0, 1, 40])
def test_prefill_with_windows_and_block_sizes(sliding_window: int, block_size: int) -> None:
    case = make_case([(80, 50), (60, 1), (64, 2)], block_size=block_size, seed=block_size)
    config = PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=2)
    assert_matches(prefill(case, sliding_window, config), case, sliding_window)


@pytest.mark.parametrize(
    ("dtype", "sliding_window", "names"),
    [
        (DTYPES[0], 25, ()),
        (DTYPES[-1], 0, ()),
        *([(DTYPES[-1], 25, ("soft_cap",)), (DTYPES[-1], 25, ("alibi_slopes", "sinks"))] if GPU else []),
    ],
    ids=str,
)
def test_a_token_is_bitwise_the_same_however_the_batch_is_cut(
    dtype: torch.dtype, sliding_window: int, names: tuple[str, ...]
) -> None:
    """In one chunk, in several, one by one beside strangers: the same bits."""
    require_invariant_products()
    length = 60 if not GPU else 1500
    heads = (4, 2, 64) if not GPU else (32, 8, 128)
    config = PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=2) if not GPU else None
    variant = make_variant(heads[0], *names)
    whole = make_case([(length, length)], heads, dtype=dtype)
    expected = prefill(whole, sliding_window, config, **variant)
    positions = [*range(0, length, length // 4), length - 1]
    cut = sorted({0, 1, length // 3, length // 2 + 1, length})
    chunks = [(end, end - begin) for begin, end in pairwise(cut)]
    singles = [(position + 1, 1) for position in positions]
    strangers = make_case([(18, 18), (40, 1)], heads, dtype=dtype, seed=9)
    for batch in (chunks, singles):
        case = joined(whole, batch, strangers)
        out = prefill(case, sliding_window, config, **variant)
        at = sum(strangers.counts)
        for end, count in batch:
            assert torch.equal(out[at : at + count], expected[end - count : end]), (end, count)
            at += count


def joined(whole: Case, batch: list[tuple[int, int]], strangers: Case) -> Case:
    """The strangers and, after them, parts (end, count) of the one request of `whole`."""
    shift = len(strangers.key)
    table = torch.full((9, whole.block_table.shape[1]), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    table[: len(strangers.block_table), : strangers.block_table.shape[1]] = strangers.block_table
    own = whole.block_table[whole.rows[0]]
    table[8] = torch.where(own < len(whole.key), own + shift, own)
    return Case(
        query=torch.cat([strangers.query, *(whole.query[end - count : end] for end, count in batch)]),
        key=torch.cat([strangers.key, whole.key]),
        value=torch.cat([strangers.value, whole.value]),
        block_table=table,
        rows=torch.cat([strangers.rows, torch.full((len(batch),), 8, dtype=torch.int32, device=DEVICE)]),
        counts=strangers.counts + [count for _, count in batch],
        seq_lens=strangers.seq_lens + [end for end, _ in batch],
    )


def in_e4m3(case: Case) -> tuple[Case, Case, torch.Tensor]:
    """The case over a pool of e4m3, over one of the numbers that it stands for, and the pool's scales."""
    scales = torch.tensor([0.5, 2.0], device=DEVICE)
    caches = zip((case.key, case.value), scales, strict=True)
    key, value = ((cache.float() / scale).to(torch.float8_e4m3fn) for cache, scale in caches)
    exact = replace(
        case,
        key=(key.float() * scales[0]).to(case.key.dtype),
        value=(value.float() * scales[1]).to(case.value.dtype),
    )
    return replace(case, key=key, value=value), exact, scales


E4M3_CASES = [((9, 3, 64), torch.float16, ()), ((9, 3, 64), torch.float16, VARIANTS[-1])]
if GPU:  # three kernels are compiled for each
    E4M3_CASES = [
        ((9, 3, 64), torch.float32, ()),
        ((9, 3, 64), torch.float16, VARIANTS[-1]),
        ((8, 2, 128), torch.bfloat16, ()),
        ((8, 2, 128), torch.bfloat16, VARIANTS[-1]),
    ]


@pytest.mark.parametrize(("heads", "dtype", "names"), E4M3_CASES, ids=str)
def test_pools_of_e4m3(heads: tuple[int, int, int], dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Their numbers are exact in fp16, in which they are multiplied, unless the query has 32 bits."""
    variant = make_variant(heads[0], *names)
    small, exact, scales = in_e4m3(make_case([(70, 1), (0, 1), (33, 1), (1, 1)], heads, dtype=dtype))
    for num_splits in (1, 3):
        assert_matches(decode(small, num_splits, kv_scales=scales, **variant), exact, **variant)
    small, exact, scales = in_e4m3(make_case([(70, 50), (40, 1), (20, 20)], heads, dtype=dtype))
    assert_matches(prefill(small, kv_scales=scales, **variant), exact, **variant)


@pytest.mark.parametrize(("prefix_len", "num_splits"), [(0, 1), (32, 1), (80, 2)])
@pytest.mark.parametrize(
    ("heads", "dtype", "names", "e4m3"),
    [
        ((9, 3, 64), DTYPES[0], (), False),
        ((9, 3, 64), DTYPES[0], ("soft_cap", "sinks"), False),
        ((9, 3, 64), DTYPES[0], ("soft_cap", "sinks"), True),
        ((8, 2, 128), DTYPES[-1], (), False),
        *([((8, 2, 128), DTYPES[-1], (), True)] if GPU else []),
    ],
    ids=str,
)
def test_a_shared_prefix_changes_nothing_but_who_reads_it(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    names: tuple[str, ...],
    prefix_len: int,
    num_splits: int,
    e4m3: bool,
) -> None:
    variant = make_variant(heads[0], *names)
    case = make_case([(100, 1), (81, 1), (0, 1), (90, 1), (130, 1)], heads, dtype=dtype)
    table, shared = case.block_table, prefix_len // 16
    for request in (1, 4):
        table[case.rows[request], :shared] = table[case.rows[0], :shared]
    expected = case
    scales = {}
    if e4m3:
        case, expected, scales["kv_scales"] = in_e4m3(case)
    num_seqs, num_prefix_splits = len(case.seq_lens), 3
    workspace = split_workspace(num_seqs, num_seqs * (num_splits + num_prefix_splits), *heads, DEVICE)
    workspace.partials.fill_(torch.nan)
    workspace.log_sums.fill_(torch.nan)
    pool = {"key_cache": case.key, "value_cache": case.value, "block_table": table}
    prefix = shared_prefix_attention(
        case.query,
        **pool,
        prefix_row=case.rows[:1],
        prefix_len=torch.tensor([prefix_len], dtype=torch.int32, device=DEVICE),
        # The fourth request begins otherwise.
        prefix_lens=torch.tensor([prefix_len] * 3 + [0, prefix_len], dtype=torch.int32, device=DEVICE),
        scale=SCALE,
        soft_cap=variant.get("soft_cap", 0.0),
        num_splits=num_splits,
        num_prefix_splits=num_prefix_splits,
        workspace=workspace,
        **scales,
    )
    out = paged_decode_attention(
        case.query,
        **pool,
        rows=case.rows,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=DEVICE),
        scale=SCALE,
        num_splits=num_splits,
        out=case.poisoned_out(),
        workspace=workspace,
        prefix=prefix,
        **scales,
        **variant,
    )
    assert_matches(out, expected, **variant)
    assert int(workspace.arrivals.abs().sum()) == 0


def test_a_prefix_is_split_into_one_wave() -> None:
    assert prefix_splits(256, 32, 8, 132, 128) == 2
    assert prefix_splits(256, 16, 8, 132, 128) == 4
    assert prefix_splits(4096, 32, 8, 132, 128) == 1
    workspace = prefix_workspace(256, 32, 8, 128, 132, 128, torch.device("cpu"))
    assert workspace.partials.numel() >= 256 * 3 * 32 * 128


def test_tiles_cover_every_token_once_and_the_longest_context_comes_first() -> None:
    counts, seq_lens = np.array([5, 1, 64, 33]), np.array([500, 900, 64, 40])
    request, start = prefill_tiles(counts, seq_lens, 32)
    covered = sorted(
        (r, t) for r, s in zip(request, start, strict=True) for t in range(s, min(s + 32, counts[r]))
    )
    assert covered == [(r, t) for r, count in enumerate(counts) for t in range(count)]
    assert request[0] == 1
    assert request[1] == 0
    assert (request.dtype, start.dtype) == (np.int32, np.int32)
    assert len(request) <= max_prefill_tiles(int(counts.sum()), len(counts), 32)


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (64, 64), (100, 3), (8192, 256), (31, 40)])
def test_the_bound_of_tiles_is_reached_by_the_worst_cut_and_not_passed(tokens: int, requests: int) -> None:
    bound = max_prefill_tiles(tokens, requests, 32)
    requests = min(requests, tokens)
    # As many chunks as can be of one token more than a whole number of tiles.
    spare = (tokens - requests) // 32
    counts = np.ones(requests, dtype=np.int64)
    counts[0] += spare * 32
    counts[-1] += tokens - counts.sum()
    request, _ = prefill_tiles(counts, counts, 32)
    assert bound - 1 <= len(request) <= bound


def test_splits_fill_the_device_and_stop_when_the_batch_does() -> None:
    assert decode_splits(1, 8, 132) == 16
    assert decode_splits(16, 8, 132) == 2
    assert decode_splits(256, 8, 132) == 1
    workspace = decode_workspace(256, 32, 8, 128, 132, torch.device("cpu"))
    for num_seqs in range(1, 257):
        splits = decode_splits(num_seqs, 8, 132)
        if splits > 1:
            assert num_seqs * splits * 32 * 128 <= workspace.partials.numel()
            assert num_seqs * splits * 32 <= workspace.log_sums.numel()
        assert num_seqs * 8 <= workspace.arrivals.numel()


CONSTANT_STRIDES = {
    "QUERY_STRIDE_TOKEN": 6144,
    "QUERY_STRIDE_HEAD": 128,
    "KEY_STRIDE_BLOCK": 16384,
    "KEY_STRIDE_SLOT": 1024,
    "KEY_STRIDE_HEAD": 128,
    "VALUE_STRIDE_BLOCK": 16384,
    "VALUE_STRIDE_SLOT": 1024,
    "VALUE_STRIDE_HEAD": 128,
    "TABLE_STRIDE": 512,
    "OUT_STRIDE_TOKEN": 4096,
    "OUT_STRIDE_HEAD": 128,
}
POINTERS = {f"{name}_ptr": "*bf16" for name in ("query", "key", "value", "out")}
SCALARS = {"scale": "fp32", "window": "i32"}
PLAIN = {"slopes_ptr": None, "sinks_ptr": None, "SOFT_CAP": 0.0}
VARIED = {"SOFT_CAP": 50.0}
NO_SCALES = {"kv_scales_ptr": None}
E4M3_POINTERS = {"key_ptr": "*fp8e4nv", "value_ptr": "*fp8e4nv", "kv_scales_ptr": "*fp32"}
VARIED_POINTERS = {"slopes_ptr": "*fp32", "sinks_ptr": "*bf16"}
SHARED_LIMIT = 227 * 1024


@pytest.mark.parametrize(
    ("num_seqs", "split", "prefix", "varied", "e4m3"),
    [
        (1, True, False, False, False),
        (16, True, False, False, False),
        (16, True, False, True, False),
        (64, False, True, False, False),
        (256, False, False, False, False),
        pytest.param(1, True, False, False, True, marks=pytest.mark.slow),
        pytest.param(16, True, False, True, True, marks=pytest.mark.slow),
        (64, False, True, False, True),
    ],
)
def test_decode_compiles_for_hopper(
    num_seqs: int, split: bool, prefix: bool, varied: bool, e4m3: bool
) -> None:
    """With a window, a cap, slopes and sinks, or with none of them."""
    config = decode_config(128, torch.bfloat16, num_seqs * 8)
    integers = dict.fromkeys(
        ("table_ptr", "rows_ptr", "seq_lens_ptr", "prefix_lens_ptr", "arrivals_ptr"), "*i32"
    )
    floats = dict.fromkeys(("partials_ptr", "log_sums_ptr"), "*fp32")
    constants = {
        **CONSTANT_STRIDES,
        "BLOCK_SIZE": 16,
        "GROUP": 4,
        "HEAD_DIM": 128,
        "BLOCK_G": 16,
        "BLOCK_D": 128,
        "BLOCK_N": config.block_n,
        "SPLIT": split,
        "HAS_PREFIX": prefix,
        "PREFIX_BLOCK_N": 128,
        "HAS_WINDOW": varied,
        **(VARIED if varied else PLAIN),
        **({} if e4m3 else NO_SCALES),
    }
    binary = compile_overlapping(
        "engine.kernels.paged_attention.decode:_decode_kernel",
        POINTERS
        | integers
        | floats
        | SCALARS
        | {"prefix_splits": "i32", "min_share": "i32"}
        | (VARIED_POINTERS if varied else {})
        | (E4M3_POINTERS if e4m3 else {}),
        constants,
        early_reads=[
            *("seq_lens_ptr", "rows_ptr", "table_ptr"),
            *["prefix_lens_ptr"] * prefix,
            *(VARIED_POINTERS if varied else ()),
            *["kv_scales_ptr"] * e4m3,
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    # Two programs per multiprocessor at least keep its memory busy.
    assert binary["shared"] <= SHARED_LIMIT // 2


@pytest.mark.parametrize("e4m3", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("varied", [False, True])
def test_prefill_compiles_for_hopper(varied: bool, e4m3: bool) -> None:
    config = prefill_config(128, torch.bfloat16, torch.float8_e4m3fn if e4m3 else torch.bfloat16)
    names = ("table", "rows", "query_start_loc", "seq_lens", "tile_request", "tile_start")
    constants = {
        **CONSTANT_STRIDES,
        "BLOCK_SIZE": 16,
        "GROUP": 4,
        "HEAD_DIM": 128,
        "BLOCK_Q": prefill_block_q(32, 8, config),
        "BLOCK_M": config.block_m,
        "BLOCK_D": 128,
        "BLOCK_N": config.block_n,
        "HAS_WINDOW": True,
        **(VARIED if varied else PLAIN),
        **({} if e4m3 else NO_SCALES),
    }
    binary = compile_for_hopper(
        "engine.kernels.paged_attention.prefill:_prefill_kernel",
        POINTERS
        | {f"{name}_ptr": "*i32" for name in names}
        | SCALARS
        | (VARIED_POINTERS if varied else {})
        | (E4M3_POINTERS if e4m3 else {}),
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert binary["shared"] <= SHARED_LIMIT


@pytest.mark.parametrize("e4m3", [False, True])
def test_the_shared_prefix_compiles_for_hopper(e4m3: bool) -> None:
    config = prefill_config(128, torch.bfloat16, torch.float8_e4m3fn if e4m3 else torch.bfloat16)
    integers = dict.fromkeys(("table_ptr", "prefix_row_ptr", "prefix_len_ptr"), "*i32")
    floats = dict.fromkeys(("partials_ptr", "log_sums_ptr"), "*fp32")
    counts = dict.fromkeys(("num_seqs", "num_splits"), "i32")
    strides = {key: value for key, value in CONSTANT_STRIDES.items() if not key.startswith("OUT")}
    binary = compile_for_hopper(
        "engine.kernels.paged_attention.prefix:_prefix_kernel",
        {key: POINTERS[key] for key in ("query_ptr", "key_ptr", "value_ptr")}
        | integers
        | floats
        | counts
        | {"scale": "fp32"}
        | (E4M3_POINTERS if e4m3 else {}),
        {
            **strides,
            **({} if e4m3 else NO_SCALES),
            "BLOCK_SIZE": 16,
            "GROUP": 4,
            "HEAD_DIM": 128,
            "BLOCK_M": config.block_m,
            "BLOCK_D": 128,
            "BLOCK_N": config.block_n,
            "SOFT_CAP": 0.0,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert binary["shared"] <= SHARED_LIMIT
