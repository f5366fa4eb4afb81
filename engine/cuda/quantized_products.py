"""How quantized layers multiply on a GPU: a product for each layout that has kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.cuda.fp8_products import Fp8Products, has_fp8
from engine.cuda.quantized_experts import CudaQuantizedExperts
from engine.cuda.word_matrix import word_matrix
from engine.kernels.linear.tiled import ShareWorkspace, TileConfig, invariant_linear
from engine.kernels.quantized.choice import choose_int8, choose_product, invariant_words
from engine.kernels.quantized.dequantize import dequantize
from engine.kernels.quantized.int8 import multiply_int8, quantize_tokens
from engine.kernels.quantized.outliers import add_outliers
from engine.kernels.quantized.rows import WordRowsConfig, multiply_by_rows
from engine.kernels.quantized.tiles import WordConfig, multiply_by_words
from engine.kernels.quantized.words import WordMatrix
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import LinearMethods
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.layouts.groups import GroupedInts, Int8Groups, PackedGroups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.table import TableWeights
from engine.quant.layouts.tiles import TILE_ROWS, WordTiles, tiles_of_groups, tiles_of_table
from engine.quant.products import Form, LayoutProducts, Product

# For two programs on each of 132 multiprocessors with tiles of 128 x 128, or as many smaller ones.
_TILE_ELEMENTS = 264 * 128 * 128
_TILES = 16384
# Of a dequantized part of a matrix: what is written there is read again from the L2 cache.
_SCRATCH_BYTES = 32 << 20
# The tensor memory accelerator's alignment.
_ROW_BYTES = 16

# (x, w, bias, out): writes x @ w.T + bias to out.
Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]


def cuda_layout_products(
    device: torch.device,
    *,
    deterministic: bool,
    dense: Dense | None = None,
    experts: Callable[[LinearMethods], ExpertMethod] | None = None,
    fp8_products: type[Fp8Products] = Fp8Products,
) -> LayoutProducts:
    """The products of a worker.

    Args:
        device: of its model.
        deterministic: have each token's result bitwise the same whatever else is in the step.
        dense: multiplies by plain matrices; by default torch does, or a kernel of ours that is deterministic.
        experts: makes the method of quantized experts.
        fp8_products: how e4m3 weights are multiplied.
    """
    workspace = Workspace(device)
    words = WordProducts(workspace, dense or (_invariant if deterministic else _by_torch), deterministic)
    products: dict[type[Layout], Product] = {
        WordTiles: words.multiply,
        Int8Channels: Int8Products(workspace).multiply,
    }

    def in_tiles(layout: GroupedInts | TableWeights) -> Layout:
        workspace.reserve()
        return tiles_of_table(layout) if isinstance(layout, TableWeights) else tiles_of_groups(layout)

    def as_it_is(layout: Int8Channels) -> Layout:
        workspace.reserve()
        return layout

    forms: dict[type[Layout], Form] = {
        PackedGroups: in_tiles,
        Int8Groups: in_tiles,
        TableWeights: in_tiles,
        Int8Channels: as_it_is,
    }
    if has_fp8(device):
        fp8 = fp8_products(device, deterministic=deterministic)
        products |= {Fp8Channels: fp8.channels, Fp8Blocks: fp8.blocks}
    by_tiles = partial(CudaQuantizedExperts, deterministic=deterministic)
    return LayoutProducts(products, forms, experts or by_tiles)


class Workspace:
    """Space that products share, of which one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._space: tuple[ShareWorkspace, torch.Tensor] | None = None

    def reserve(self) -> tuple[ShareWorkspace, torch.Tensor]:
        """Where programs leave their parts of tiles, and bytes for dequantized weights. Allocated when the
        first layer is loaded: most workers have none, and graphs that are captured must find it there."""
        if self._space is None:
            shares = ShareWorkspace.make(self._device, tile_elements=_TILE_ELEMENTS, tiles=_TILES)
            scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=self._device)
            self._space = shares, scratch
        return self._space

    @property
    def shares(self) -> ShareWorkspace:
        """Where programs leave their parts of tiles."""
        return self.reserve()[0]

    def scratch(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns], unfilled."""
        return self.reserve()[1].view(dtype)[: rows * columns].view(rows, columns)


class WordProducts:
    """Products with weights in tiles of words."""

    def __init__(self, workspace: Workspace, dense: Dense, deterministic: bool) -> None:
        self._workspace = workspace
        self._dense, self._deterministic = dense, deterministic

    def multiply(self, layout: WordTiles, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        if layout.order is not None:
            x = x[:, layout.order]
        matrix = word_matrix(layout)
        config = self.choose(matrix, x)
        if isinstance(config, WordRowsConfig):
            out = multiply_by_rows(x, matrix, bias, config=config)
        elif config is not None:
            out = multiply_by_words(x, matrix, bias, config=config, workspace=self._workspace.shares)
        else:
            out = self._multiply_plain(matrix, x, bias)
        if layout.outliers is not None:
            outliers = layout.outliers
            add_outliers(x, outliers.row_starts, outliers.columns, outliers.values, out)
        return out

    def choose(self, matrix: WordMatrix, x: torch.Tensor) -> WordConfig | WordRowsConfig | None:
        """The kernel's config; None for dequantizing the weights first."""
        if x.element_size() != 2 or not matrix.fits_tiles:
            return None
        if self._deterministic:
            return invariant_words(len(x))
        return choose_product(matrix, len(x))

    def _multiply_plain(self, matrix: WordMatrix, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Dequantizes some outputs after the others, and multiplies by them."""
        most = max(TILE_ROWS, _SCRATCH_BYTES // x.element_size() // matrix.k // TILE_ROWS * TILE_ROWS)
        out = x.new_empty(len(x), matrix.n)
        for begin in range(0, matrix.n, most):
            end = min(begin + most, matrix.n)
            weight = self._workspace.scratch(end - begin, matrix.k, x.dtype)
            dequantize(matrix, begin, weight)
            self._dense(x, weight, None if bias is None else bias[begin:end], out[:, begin:end])
        return out


def _by_torch(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(bias, x, w.T, out=out)


def _invariant(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if w.stride(0) * w.element_size() % _ROW_BYTES:
        _by_torch(x, w, bias, out)
    else:
        out.copy_(invariant_linear(x, w, bias))


class Int8Products:
    """Products of int8 with int8."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def multiply(self, layout: Int8Channels, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        n, k = layout.codes.shape
        if k % _ROW_BYTES:
            return layout.multiply(x, bias)
        codes, input_scales = quantize_tokens(x, layout.input_scale, layout.input_zero)
        return multiply_int8(
            codes,
            input_scales,
            layout.codes,
            layout.scales,
            bias,
            x.dtype,
            zero=layout.input_zero,
            sums=layout.sums,
            config=self.choose(len(x), n, k),
            workspace=self._workspace.shares,
        )

    def choose(self, m: int, n: int, k: int) -> TileConfig:
        """The kernel's config for m tokens."""
        return choose_int8(m, n, k)
