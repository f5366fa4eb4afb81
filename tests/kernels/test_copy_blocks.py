"""The copy of KV blocks against its definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.copy_blocks.kernel import copy_blocks
from engine.kernels.copy_blocks.naive import naive_copy_blocks
from tests.kernels.hopper import compile_for_hopper

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Layers, blocks, block size, heads, channels: a block of more than one part, odd ones, the smallest.
SHAPES = [(2, 9, 16, 3, 64), (3, 7, 5, 1, 24), (1, 4, 1, 1, 8)] + [(32, 700, 16, 8, 128)] * ON_GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    num_layers, num_blocks, *block = shape
    pool = torch.randn(num_layers, 2, num_blocks, *block, device=DEVICE).to(dtype)
    expected = pool.clone()
    words = torch.tensor([7, 0, -1, 0, 2, 3, num_blocks - 1], dtype=torch.int32, device=DEVICE)
    sources, destinations = words[1:4], words[4:7]
    naive_copy_blocks(expected, sources, destinations)
    copy_blocks(pool, sources, destinations)
    assert torch.equal(pool, expected)
    assert torch.equal(pool[:, :, 2], pool[:, :, 0])


def test_none_is_copied() -> None:
    pool = torch.randn(1, 2, 3, 4, 1, 8, device=DEVICE)
    before, none = pool.clone(), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    copy_blocks(pool, none, none)
    assert torch.equal(pool, before)


def test_offsets_need_64_bits() -> None:
    """The last block of a pool of more than 2^31 elements; memory is touched only where it is copied."""
    pool = torch.empty(2, 2, 1 << 15, 16, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    last = pool.shape[2] - 1
    pool[1, 1, 5] = 2.5
    pool[1, 1, last] = 0.0
    copy_blocks(
        pool,
        torch.tensor([5], dtype=torch.int32, device=DEVICE),
        torch.tensor([last], dtype=torch.int32, device=DEVICE),
    )
    assert bool((pool[1, 1, last] == 2.5).all())


def test_compiles_for_hopper() -> None:
    sizes = compile_for_hopper(
        "engine.kernels.copy_blocks.kernel:copy_blocks_kernel",
        {"pool": "*bf16", "sources": "*i32", "destinations": "*i32", "num_blocks": "i32"},
        {"N": 16 * 8 * 128, "BLOCK": 2048},
        num_warps=4,
    )
    assert sizes["shared"] < 227 << 10
