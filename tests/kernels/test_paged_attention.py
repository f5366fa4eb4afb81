"""The torch attention backend against the naive definition, on random batches in a poisoned pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention.interface import AttentionSpec, BatchLayout, LayerKVCache
from engine.cpu.attention import TorchAttentionBackend
from engine.kernels.paged_attention.naive import naive_paged_attention

BLOCK_SIZE = 16
CPU = torch.device("cpu")

# (context, tokens computed) of each request; one-token requests first, longest first, as the runner orders.
BATCHES = {
    "one decode": [(37, 1)],
    "first token of all": [(1, 1)],
    "decodes of one length": [(48, 1), (48, 1)],
    "decodes of many lengths": [(530, 1), (500, 1), (64, 1), (17, 1), (16, 1), (2, 1), (1, 1)],
    "whole prompts": [(5, 5), (33, 33)],
    "chunks with context": [(40, 7), (100, 33)],
    "mixed": [(90, 1), (18, 1), (64, 64), (50, 3), (16, 2)],
}


def make_case(
    batch: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, contiguous: bool, seed: int
) -> tuple[torch.Tensor, LayerKVCache, BatchLayout]:
    """A query, a pool that is NaN wherever no request's context lies, and the batch's layout."""
    num_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    counts = np.array([count for _, count in batch])
    seq_lens = np.array([length for length, _ in batch])
    blocks_of = -(-seq_lens // BLOCK_SIZE)
    pool_blocks = int(blocks_of.sum()) + 3
    free = np.arange(pool_blocks) if contiguous else rng.permutation(pool_blocks)
    # Entries past a request's own blocks point to blocks full of NaN.
    block_table = np.full((len(batch), int(blocks_of.max())), free[-1])
    shape = (pool_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    cache = LayerKVCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    taken, slots = 0, []
    for request, (length, count) in enumerate(batch):
        own = free[taken : taken + blocks_of[request]]
        taken += blocks_of[request]
        block_table[request, : len(own)] = own
        positions = np.arange(length)
        mapping = torch.from_numpy(own[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        fresh = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for _ in range(2)]
        cache.store(*fresh, mapping)
        slots.append(mapping[length - count :])
    query = torch.randn(int(counts.sum()), num_heads, head_dim).to(dtype)
    layout = BatchLayout(counts, seq_lens, block_table, torch.cat(slots).numpy(), BLOCK_SIZE)
    return query, cache, layout


@pytest.mark.parametrize("contiguous", [False, True], ids=["scattered", "contiguous"])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (8, 1, 16)], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_naive_definition(name: str, heads: tuple[int, int, int], contiguous: bool) -> None:
    query, cache, layout = make_case(BATCHES[name], heads, torch.float32, contiguous, seed=len(name))
    backend = TorchAttentionBackend(CPU, torch.float32)
    before = cache.key.clone()
    metadata = backend.prepare(layout)
    output = backend.forward(query, cache, metadata, AttentionSpec(0.2))
    expected = naive_paged_attention(
        query,
        cache.key,
        cache.value,
        query_start_loc=[0, *np.cumsum(layout.counts).tolist()],
        seq_lens=layout.seq_lens.tolist(),
        block_table=torch.from_numpy(layout.block_table),
        scale=0.2,
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(before.nan_to_num(9.0), cache.key.nan_to_num(9.0)), "attention changed the pool"


SLOPES, SINKS = torch.tensor([0.5, 0.1, 0.25, 0.05]), torch.tensor([1.0, -1.0, 0.0, 2.0])
VARIANTS = {
    "window of one": AttentionSpec(0.2, sliding_window=1),
    "window": AttentionSpec(0.2, sliding_window=16),
    "soft cap": AttentionSpec(0.2, soft_cap=1.2),
    "slopes": AttentionSpec(0.2, alibi_slopes=SLOPES),
    "sinks": AttentionSpec(0.2, sinks=SINKS),
    "all": AttentionSpec(0.2, 37, 1.2, SLOPES, SINKS),
}


@pytest.mark.parametrize("contiguous", [False, True], ids=["scattered", "contiguous"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BATCHES)
def test_every_variant_equals_the_naive_definition(name: str, variant: str, contiguous: bool) -> None:
    query, cache, layout = make_case(BATCHES[name], (4, 2, 16), torch.float32, contiguous, seed=len(name))
    spec = VARIANTS[variant]
    backend = TorchAttentionBackend(CPU, torch.float32)
    output = backend.forward(query, cache, backend.prepare(layout), spec)
    expected = naive_paged_attention(
        query,
        cache.key,
        cache.value,
        query_start_loc=[0, *np.cumsum(layout.counts).tolist()],
        seq_lens=layout.seq_lens.tolist(),
        block_table=torch.from_numpy(layout.block_table),
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        alibi_slopes=spec.alibi_slopes,
        sinks=spec.sinks,
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_as_its_precision_allows() -> None:
    query, cache, layout = make_case(BATCHES["mixed"], (9, 3, 64), torch.bfloat16, False, seed=5)
    backend = TorchAttentionBackend(CPU, torch.bfloat16)
    metadata = backend.prepare(layout)
    expected = naive_paged_attention(
        query,
        cache.key,
        cache.value,
        query_start_loc=[0, *np.cumsum(layout.counts).tolist()],
        seq_lens=layout.seq_lens.tolist(),
        block_table=torch.from_numpy(layout.block_table),
        scale=0.125,
    )
    torch.testing.assert_close(
        backend.forward(query, cache, metadata, AttentionSpec(0.125)), expected, rtol=2e-2, atol=2e-2
    )


def test_padding_of_batched_decodes_is_bounded() -> None:
    """A long context beside many short ones must not make every short one as dear as the long one."""
    batch = [(4096, 1)] + [(20, 1)] * 63
    counts, lengths = np.ones(64, dtype=np.int64), np.array([length for length, _ in batch])
    table = np.arange(64 * 256).reshape(64, 256)
    layout = BatchLayout(counts, lengths, table, np.zeros(64, dtype=np.int64), BLOCK_SIZE)
    backend = TorchAttentionBackend(CPU, torch.float32)
    decodes = backend.calls(backend.prepare(layout), sliding_window=0).decodes
    gathered = sum((bucket.end - bucket.begin) * bucket.length for bucket in decodes)
    assert gathered < 1.5 * lengths.sum()


def test_blocks_behind_a_window_are_neither_gathered_nor_seen() -> None:
    """A layer with a window costs what the window holds, whatever is left behind it."""
    query, cache, layout = make_case([(500, 1), (400, 8)], (4, 2, 16), torch.float32, False, seed=3)
    backend, spec = TorchAttentionBackend(CPU, torch.float32), AttentionSpec(0.2, sliding_window=20)
    expected = backend.forward(query, cache, backend.prepare(layout), spec)
    for request, first_seen in enumerate((480, 373)):
        behind = layout.block_table[request, : first_seen // BLOCK_SIZE]
        cache.key[behind], cache.value[behind] = torch.nan, torch.nan
    metadata = backend.prepare(layout)
    assert torch.equal(backend.forward(query, cache, metadata, spec), expected)
    calls = backend.calls(metadata, sliding_window=20)
    assert calls.decodes[0].length < 20 + BLOCK_SIZE
    assert calls.chunks[0].length < 27 + BLOCK_SIZE


def test_storing_writes_the_mapped_slots_and_no_other() -> None:
    cache = LayerKVCache(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8))
    key, value = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    cache.store(key, value, torch.tensor([9, 2]))
    assert torch.equal(cache.key[2, 1], key[0])
    assert torch.equal(cache.value[0, 2], value[1])
    assert int(cache.key.abs().sum(dim=(2, 3)).count_nonzero()) == 2
