"""The gated activation's kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.activate_and_mul.kernel import activate_and_mul, launch_block
from engine.kernels.activate_and_mul.naive import naive_activate_and_mul
from tests.kernels.hopper import compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# One token and odd numbers of them, a ragged last block, and enough work for the large blocks.
SHAPES = [(1, 3072), (3, 1536), (5, 100), (129, 2048), (33, 8000)] + [
    (1, 14336), (255, 3072), (8192, 14336), (8191, 3072)
] * ON_GPU  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Relative: both compute in fp32 and round once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_its_definition(activation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_tokens, width = shape
    gate_up = (torch.randn(num_tokens, 2 * width, device=DEVICE) * 4).to(dtype)
    out = torch.full((num_tokens, width), torch.nan, dtype=dtype, device=DEVICE)
    assert activate_and_mul(gate_up, activation, out=out) is out
    expected = naive_activate_and_mul(gate_up, activation)
    # Far below zero gelu is 1 less nearly 1.
    torch.testing.assert_close(
        out, expected, rtol=TOLERANCE[dtype], atol=1e-6 if activation == "silu" else 3e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero_neither_overflow_nor_vanish(activation: str) -> None:
    gate = torch.tensor([[-1e12, -200.0, -90.0, 90.0, 200.0, 1e12]], device=DEVICE)
    out = activate_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1), activation)
    torch.testing.assert_close(out, gate.clamp_min(0.0), rtol=1e-6, atol=1e-30)


def test_rows_may_be_strided() -> None:
    wide = torch.randn(3, 500, device=DEVICE)
    out = torch.full((3, 200), torch.nan, device=DEVICE)
    activate_and_mul(wide[:, 7:207], "silu", out=out[:, :100])
    expected = naive_activate_and_mul(wide[:, 7:207], "silu")
    torch.testing.assert_close(out[:, :100], expected, rtol=1e-5, atol=1e-6)
    assert bool(out[:, 100:].isnan().all())
    assert activate_and_mul(wide[:0, :200], "silu").shape == (0, 100)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_for_hopper(activation: str) -> None:
    sizes = compile_overlapping(
        "engine.kernels.activate_and_mul.kernel:activate_and_mul_kernel",
        {"gate_up": "*bf16", "out": "*bf16", "gate_up_stride": "i32", "out_stride": "i32"},
        {"N": 14336, "BLOCK": launch_block(8192, 14336), "ACTIVATION": activation},
        num_warps=4,
    )
    assert sizes["shared"] < 227 << 10
