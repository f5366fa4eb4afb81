"""What lies between products, against torch and against attention's definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention.interface import (
    AttentionSpec,
    BatchLayout,
    HeadLayout,
    LayerKVCache,
    QKNorm,
    RotaryTable,
)
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.kernels.library import ACTIVATIONS, NativeLibrary
from engine.cpu.ops import TorchLayerOps
from engine.kernels.paged_attention.naive import naive_paged_attention
from tests.kernels.test_paged_attention import BATCHES, make_case

CPU = torch.device("cpu")
OPS = TorchLayerOps(CPU)


@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("size", [576, 61])
def test_norms_are_torchs(native: NativeLibrary, num_tokens: int, size: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(num_tokens, size), torch.randn(num_tokens, size), torch.randn(size)
    torch.testing.assert_close(native.rms_norm(residual, weight, 1e-5), OPS.rms_norm(residual, weight, 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    wide = torch.cat((x, x), dim=1)[:, :size]
    out = native.rms_norm(ours, weight, 1e-5, wide)
    torch.testing.assert_close(out, OPS.add_rms_norm(x, theirs, weight, 1e-5))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 21), (30, 1536)], ids=str)
def test_gates_are_torchs(native: NativeLibrary, activation: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1]) * 6
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    out = native.activate_and_mul(gate_up, activation)
    torch.testing.assert_close(out, OPS.activate_and_mul(gate_up.clone(), activation), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 21), (40, 1024)], ids=str)
@pytest.mark.parametrize(("factor", "soft_cap"), [(1.7, 0.0), (1.0, 30.0), (0.5, 2.0)])
def test_scales_and_caps_are_torchs(
    native: NativeLibrary, shape: tuple[int, int], factor: float, soft_cap: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 20
    out = native.scale(x, factor, soft_cap)
    torch.testing.assert_close(out, OPS.scale(x, factor, soft_cap), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("rotary", ["none", "half", "interleaved", "scaled"])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_turned_and_stored_as_by_torch(
    native: NativeLibrary, rotary: str, normed: bool
) -> None:
    torch.manual_seed(0)
    heads, num_tokens = HeadLayout(6, 2, 20), 40
    qkv = torch.randn(num_tokens, 10 * 20)
    positions = torch.randint(0, 90, (num_tokens,))
    table = RotaryTable(torch.randn(90, 12), interleaved=rotary == "interleaved")
    if rotary == "scaled":
        table = replace(table, query_scale=torch.rand(90))
    norm = QKNorm(torch.randn(20), torch.randn(20), 1e-6) if normed else None
    backend = TorchAttentionBackend(CPU, torch.float32)
    layout = make_case([(num_tokens, num_tokens)], (6, 2, 20), torch.float32, False, 0)[2]
    metadata = backend.prepare(layout)
    pool = torch.zeros(2, 2, 9, 16, 2, 20)
    caches = [LayerKVCache(each[0], each[1]) for each in pool]
    rotation = None if rotary == "none" else backend.rotation(table, positions)
    expected = backend.rotate_and_store(qkv.clone(), heads, norm, rotation, caches[0], metadata)
    given = None if rotary == "none" else (table, positions)
    query = native.rotate_and_store(qkv.clone(), heads, norm, given, caches[1], metadata.slot_mapping)
    torch.testing.assert_close(query, expected)
    torch.testing.assert_close(caches[1].key, caches[0].key)
    torch.testing.assert_close(caches[1].value, caches[0].value)


SPECS = {
    "plain": AttentionSpec(0.2),
    "window": AttentionSpec(0.2, sliding_window=19),
    "cap": AttentionSpec(0.9, soft_cap=2.0),
    "slopes": AttentionSpec(0.2, alibi_slopes=torch.linspace(0.01, 0.5, 12)),
    "sinks": AttentionSpec(0.2, sinks=torch.linspace(-3, 3, 12)),
    "all": AttentionSpec(
        0.2, sliding_window=40, soft_cap=3.0, alibi_slopes=torch.linspace(0.0, 0.2, 12), sinks=torch.ones(12)
    ),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("heads", "spec"),
    [
        *(((12, 4, 32), spec) for spec in SPECS),
        ((12, 1, 20), "window"),
        ((12, 12, 64), "plain"),
        ((12, 3, 18), "all"),
    ],
    ids=str,
)
def test_attention_is_its_definition(
    native: NativeLibrary, name: str, heads: tuple[int, int, int], spec: str
) -> None:
    query, cache, layout = make_case(BATCHES[name], heads, torch.float32, False, seed=len(name))
    before = cache.key.clone()
    output = native.attend(query, cache, layout, SPECS[spec])
    options = SPECS[spec]
    expected = naive_paged_attention(
        query,
        cache.key,
        cache.value,
        query_start_loc=[0, *np.cumsum(layout.counts).tolist()],
        seq_lens=layout.seq_lens.tolist(),
        block_table=torch.from_numpy(layout.block_table),
        scale=options.scale,
        sliding_window=options.sliding_window,
        soft_cap=options.soft_cap,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(before.nan_to_num(9.0), cache.key.nan_to_num(9.0)), "attention changed the pool"


def attended_alone(
    native: NativeLibrary, query: torch.Tensor, cache: LayerKVCache, layout: BatchLayout, size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The last request of a batch, `size` tokens at a time, by each of the specs."""
    count, length = int(layout.counts[-1]), int(layout.seq_lens[-1])
    own = query[-count:]
    for name, spec in SPECS.items():
        parts = []
        for begin in range(0, count, size):
            part = own[begin : begin + size].contiguous()
            end = np.array([length - count + begin + len(part)])
            alone = replace(
                layout, counts=np.array([len(part)]), seq_lens=end, block_table=layout.block_table[-1:]
            )
            parts.append(native.attend(part, cache, alone, spec))
        yield name, torch.cat(parts)


@pytest.mark.parametrize("heads", [(12, 4, 32), (12, 6, 18)], ids=str)
def test_a_token_attends_with_the_same_bits_however_it_is_computed(
    native: NativeLibrary, library_path: Path, heads: tuple[int, int, int]
) -> None:
    """Beside others, alone, in chunks, by one thread or several; over several segments of keys."""
    batch = [(300, 1), (40, 1), (30, 30), (530, 27)]
    query, cache, layout = make_case(batch, heads, torch.float32, False, seed=1)
    together = {name: native.attend(query, cache, layout, spec)[-27:] for name, spec in SPECS.items()}
    one_thread = NativeLibrary(library_path, 1, native.instructions)
    for library, size in ((native, 1), (one_thread, 3), (native, 13), (one_thread, 27)):
        for name, alone in attended_alone(library, query, cache, layout, size):
            assert torch.equal(alone, together[name]), (name, size)
    one_thread.close()
