"""Products of e4m3 weights on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.kernels.fp8.choice import (
    can_multiply,
    choose_fp8,
    choose_one_token,
    fits_one_token,
    invariant_config,
    multiply_fp8,
    torch_fits,
    torch_product,
)
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.kernels.fp8.quantize import quantize
from engine.kernels.linear.matrix_vector import one_token_rows
from engine.kernels.linear.tiled import ShareWorkspace
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.schemes import Activations
from pagewire.base.errors import ConfigError

# The least compute capability that converts to and from e4m3.
_CAPABILITY = (8, 9)
# For two programs on each of 132 multiprocessors with tiles of 64 x 128; and for all tiles of 64 tokens.
_TILE_ELEMENTS = 264 * 64 * 128
_TILES = 8192
# Of tokens: more than any kernel's limit.
_ANY_NUMBER = 1 << 30


def has_fp8(device: torch.device) -> bool:
    """Whether kernels may compute with e4m3."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


class Fp8Products:
    """By the kernel that was measured to be the fastest for each number of tokens.

    Args:
        deterministic: have each token's product bitwise the same whatever else is in the step.
    """

    def __init__(self, device: torch.device, *, deterministic: bool) -> None:
        self._deterministic = deterministic
        self._workspace = ShareWorkspace.make(device, tile_elements=_TILE_ELEMENTS, tiles=_TILES)

    def channels(self, layout: Fp8Channels, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        is_quantized = layout.activations is not Activations.NONE
        group = layout.in_features if is_quantized else 0
        matrix = Fp8Matrix(layout.codes, layout.scales, None, group, layout.input_scale)
        return self._multiply(layout, matrix, x, bias)

    def blocks(self, layout: Fp8Blocks, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        is_quantized = layout.activations is not Activations.NONE
        group = layout.block[1] if is_quantized else 0
        return self._multiply(layout, Fp8Matrix(layout.codes, layout.scales, layout.block, group), x, bias)

    def by_reference(
        self, layout: Fp8Channels | Fp8Blocks, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Where there is no kernel."""
        return layout.multiply(x, bias)

    def by_torch(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        matrix: Fp8Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Where torch's own product is the fastest."""
        return torch_product(codes, scales, matrix, bias, dtype)

    def _multiply(
        self,
        layout: Fp8Channels | Fp8Blocks,
        matrix: Fp8Matrix,
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        num_tokens, (n, k) = x.shape[0], matrix.codes.shape
        if num_tokens == 0:
            return x.new_empty(0, n)
        if self._deterministic:
            if not can_multiply(matrix, _ANY_NUMBER):
                raise ConfigError(
                    f"deterministic is not available with FP8 weights of {n} outputs and {k} inputs in this "
                    "format: their products depend on the batch; use an unquantized checkpoint"
                )
            return multiply_fp8(x, matrix, bias, config=invariant_config(num_tokens))
        if not can_multiply(matrix, num_tokens):
            return self.by_reference(layout, x, bias)
        if num_tokens == 1 and fits_one_token(matrix, x.dtype):
            return multiply_fp8(x, matrix, bias, config=choose_one_token(n, k))
        if matrix.input_group == 0:
            return multiply_fp8(x, matrix, bias, config=replace(one_token_rows(n), overlap=True))
        in_blocks = matrix.block is not None
        config = choose_fp8(num_tokens, n, k, in_blocks=in_blocks, torch_fits=torch_fits(matrix, x.dtype))
        if config is None:
            codes, scales = quantize(x, matrix.input_group, matrix.input_scale)
            return self.by_torch(codes, scales, matrix, bias, x.dtype)
        return multiply_fp8(x, matrix, bias, config=config, workspace=self._workspace)
