"""The layer norm kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.layer_norm.kernel import add_layer_norm, layer_norm
from engine.kernels.layer_norm.naive import naive_add_layer_norm, naive_layer_norm
from engine.kernels.norm_launch import launch_shape
from tests.kernels.hopper import compile_overlapping

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
SHAPES = [(1, 1024), (3, 4096), (2, 80), (1, 9001)] + [(255, 8192), (8191, 2560), (2050, 576)] * ON_GPU
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype, has_bias: bool) -> None:
    width = shape[1]
    x = (torch.randn(shape, device=DEVICE) * 3 + 1).to(dtype)
    residual = torch.randn(shape, device=DEVICE).to(dtype)
    weight = torch.randn(width, device=DEVICE).to(dtype)
    bias = torch.randn(width, device=DEVICE).to(dtype) if has_bias else None
    out = torch.full_like(x, torch.nan)
    assert layer_norm(x, weight, bias, 1e-5, out=out) is out
    close(out, naive_layer_norm(x, weight, bias, 1e-5))
    stream = residual.clone()
    expected = naive_add_layer_norm(x, stream, weight, bias, 1e-5)
    close(add_layer_norm(x, residual, weight, bias, 1e-5), expected)
    assert torch.equal(residual, stream), "the residual stream must be rounded exactly as torch does"


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = torch.randn(2, 1000, device=DEVICE) + 1000
    weight = torch.ones(1000, device=DEVICE)
    expected = naive_layer_norm(x.double(), weight, None, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, None, 1e-5), expected.float(), rtol=1e-3, atol=1e-3)


def test_rows_may_be_strided_and_the_output_may_be_the_input() -> None:
    wide = torch.randn(5, 400, device=DEVICE)
    kept = wide.clone()
    weight = torch.randn(96, device=DEVICE)
    expected = naive_layer_norm(wide[:, :96].clone(), weight, None, 1e-5)
    x = wide[:, :96]
    assert layer_norm(x, weight, None, 1e-5, out=x) is x
    close(x, expected)
    assert torch.equal(wide[:, 96:], kept[:, 96:])
    assert layer_norm(x[:0], weight, None, 1e-5).shape == (0, 96)


def test_compiles_for_hopper() -> None:
    block, rows, num_warps = launch_shape(8192, 8192)
    sizes = compile_overlapping(
        "engine.kernels.layer_norm.kernel:layer_norm_kernel",
        {
            **dict.fromkeys(("x", "residual", "weight", "bias", "out"), "*bf16"),
            **dict.fromkeys(("num_rows", "x_stride", "residual_stride", "out_stride"), "i32"),
            "eps": "fp32",
        },
        {"N": 8192, "BLOCK_N": block, "ROWS": rows},
        early_reads=["weight"],
        num_warps=num_warps,
    )
    assert sizes["shared"] < 227 << 10
