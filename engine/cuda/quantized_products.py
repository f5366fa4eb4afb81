"""How quantized layers multiply on a GPU: a product for each layout that has kernels."""

from __future__ import annotations

import torch

from engine.cuda.fp8_products import Fp8Products, has_fp8
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.products import Form, LayoutProducts, Product


def cuda_layout_products(
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool,
    fp8_products: type[Fp8Products] = Fp8Products,
) -> LayoutProducts:
    """The products of a worker.

    Args:
        device, dtype: of its model.
        deterministic: have each token's result bitwise the same whatever else is in the step.
        fp8_products: how e4m3 weights are multiplied.
    """
    products: dict[type[Layout], Product] = {}
    forms: dict[type[Layout], Form] = {}
    if has_fp8(device):
        fp8 = fp8_products(device, deterministic=deterministic)
        products |= {Fp8Channels: fp8.channels, Fp8Blocks: fp8.blocks}
    return LayoutProducts(products, forms)
