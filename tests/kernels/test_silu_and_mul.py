"""The gated activation's kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.silu_and_mul.kernel import launch_block, silu_and_mul
from engine.kernels.silu_and_mul.naive import naive_silu_and_mul
from tests.kernels.hopper import compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# One token and odd numbers of them, a ragged last block, and enough work for the large blocks.
SHAPES = [(1, 3072), (3, 1536), (5, 100), (129, 2048), (33, 8000)] + [
    (1, 14336), (255, 3072), (8192, 14336), (8191, 3072)
] * ON_GPU  # fmt: skip
# Relative: both compute in fp32 and round once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_tokens, width = shape
    gate_up = (torch.randn(num_tokens, 2 * width, device=DEVICE) * 4).to(dtype)
    out = torch.full((num_tokens, width), torch.nan, dtype=dtype, device=DEVICE)
    assert silu_and_mul(gate_up, out=out) is out
    torch.testing.assert_close(out, naive_silu_and_mul(gate_up), rtol=TOLERANCE[dtype], atol=1e-6)


def test_gates_far_from_zero_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 90.0, 200.0, 1e30]], device=DEVICE)
    out = silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))
    torch.testing.assert_close(out, gate.clamp_min(0.0), rtol=1e-6, atol=1e-30)


def test_rows_may_be_strided() -> None:
    wide = torch.randn(3, 500, device=DEVICE)
    out = torch.full((3, 200), torch.nan, device=DEVICE)
    silu_and_mul(wide[:, 7:207], out=out[:, :100])
    expected = naive_silu_and_mul(wide[:, 7:207])
    torch.testing.assert_close(out[:, :100], expected, rtol=1e-5, atol=1e-6)
    assert bool(out[:, 100:].isnan().all())
    assert silu_and_mul(wide[:0, :200]).shape == (0, 100)


def test_compiles_for_hopper() -> None:
    sizes = compile_overlapping(
        "engine.kernels.silu_and_mul.kernel:silu_and_mul_kernel",
        {"gate_up": "*bf16", "out": "*bf16", "gate_up_stride": "i32", "out_stride": "i32"},
        {"N": 14336, "BLOCK": launch_block(8192, 14336)},
        num_warps=4,
    )
    assert sizes["shared"] < 227 << 10
