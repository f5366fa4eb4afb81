"""The RMSNorm kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import norm_launch
from engine.kernels.norm_launch import launch_shape
from engine.kernels.rms_norm.kernel import add_rms_norm, rms_norm
from engine.kernels.rms_norm.naive import naive_add_rms_norm, naive_rms_norm
from tests.kernels.hopper import compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# Widths of one block, ragged ones, and wider than a block usually is.
SHAPES = [(1, 1024), (3, 4096), (5, 576), (2, 80), (1, 9001)] + [
    (1, 4096), (255, 1024), (8191, 1024), (8192, 4096), (2050, 576), (7, 16384)
] * ON_GPU  # fmt: skip
# Both round at the same two places; the sum's order may move either rounding by one step.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[expected.dtype], atol=1e-6)


def random_rows(num_rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, residual, weight and a poisoned output."""
    x, residual = (torch.randn(num_rows, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=DEVICE).to(dtype)
    return x, residual, weight, torch.full_like(x, torch.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, _, weight, out = random_rows(*shape, dtype)
    before = x.clone()
    assert rms_norm(x, weight, 1e-5, out=out) is out
    close(out, naive_rms_norm(x, weight, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight, out = random_rows(*shape, dtype)
    before, expected_stream = x.clone(), residual.clone()
    expected = naive_add_rms_norm(x, expected_stream, weight, 1e-6)
    assert add_rms_norm(x, residual, weight, 1e-6, out=out) is out
    assert torch.equal(residual, expected_stream), "the residual stream must be rounded exactly as torch does"
    close(out, expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [200, 1024, 2048])
def test_rows_that_share_a_program_are_normalised_as_they_are_alone(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: otherwise a request's tokens would depend on what else is in its step."""
    x, residual, weight, out = random_rows(9, width, DTYPES[-1])
    assert launch_shape(9, width)[1] == 1
    alone_stream = residual.clone()
    alone = rms_norm(x, weight, 1e-5)
    alone_added = add_rms_norm(x, alone_stream, weight, 1e-5)
    monkeypatch.setattr(norm_launch, "_MANY_ROWS", 4)
    assert launch_shape(9, width)[1] > 1
    assert torch.equal(rms_norm(x, weight, 1e-5, out=out), alone)
    assert torch.equal(add_rms_norm(x, residual, weight, 1e-5, out=out.fill_(torch.nan)), alone_added)
    assert torch.equal(residual, alone_stream)


def test_rows_may_be_strided_and_the_output_may_be_the_input() -> None:
    wide = torch.randn(5, 400, device=DEVICE)
    kept = wide.clone()
    x, residual, weight = wide[:, :96], wide[:, 200:296], torch.randn(96, device=DEVICE)
    stream = residual.clone()
    expected = naive_add_rms_norm(x.clone(), stream, weight, 1e-5)
    assert add_rms_norm(x, residual, weight, 1e-5, out=x) is x
    close(x, expected)
    assert torch.equal(residual, stream)
    assert torch.equal(wide[:, 96:200], kept[:, 96:200])
    assert torch.equal(wide[:, 296:], kept[:, 296:])


def test_the_output_is_allocated_when_absent() -> None:
    x, residual, weight, _ = random_rows(3, 128, torch.float32)
    out = rms_norm(x[:, :64], weight[:64], 1e-5)
    assert out.is_contiguous()
    close(out, naive_rms_norm(x[:, :64], weight[:64], 1e-5))
    assert add_rms_norm(x[:0], residual[:0], weight, 1e-5).shape == (0, 128)


@pytest.mark.parametrize(("num_rows", "width", "adds"), [(1, 4096, False), (8192, 1024, True)])
def test_compiles_for_hopper(num_rows: int, width: int, adds: bool) -> None:
    block, rows, num_warps = launch_shape(num_rows, width)
    signature = dict.fromkeys(["x", "weight", "out"] + ["residual"] * adds, "*bf16")
    signature |= dict.fromkeys(["num_rows", "x_stride", "residual_stride", "out_stride"], "i32")
    constants = {"N": width, "BLOCK_N": block, "ROWS": rows}
    sizes = compile_overlapping(
        "engine.kernels.rms_norm.kernel:rms_norm_kernel",
        signature | {"eps": "fp32"},
        constants if adds else constants | {"residual": None},
        early_reads=["weight"],
        num_warps=num_warps,
    )
    assert sizes["shared"] < 227 << 10
