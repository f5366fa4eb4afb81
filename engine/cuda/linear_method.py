"""Matrix products of linear layers on a GPU."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.linear.choice import choose_linear, linear
from engine.kernels.linear.matrix_vector import RowsConfig
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig, invariant_linear
from engine.layers.linear_method import DenseMethod

# For two programs on each of 132 multiprocessors with tiles of 128 x 128, or one with larger ones; and for
# the tiles of 256 tokens by the largest vocabulary.
_TILE_ELEMENTS = 264 * 128 * 128
_TILES = 16384


class CudaLinearMethod(DenseMethod):
    """Unquantized weights; uses the kernel that was measured to be fastest for each number of tokens."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = ShareWorkspace.make(device, tile_elements=_TILE_ELEMENTS, tiles=_TILES)

    def choose(self, weight: torch.Tensor, num_tokens: int) -> RowsConfig | TileConfig | None:
        """The kernel's config for this number of tokens; None for torch's matrix product."""
        # Configs were measured with 16-bit weights, and only fit those.
        fits = weight.element_size() == 2
        return choose_linear(num_tokens, weight.shape[0], weight.shape[1]) if fits else None

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        config = self.choose(weight, x.shape[0])
        product: torch.Tensor = linear(x, weight, bias, config=config, workspace=self._workspace)
        return product


class InvariantMethod(DenseMethod):
    """Unquantized weights; every token's product is computed by the same instructions in any batch."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        product: torch.Tensor = invariant_linear(x, weight, bias)
        return product
