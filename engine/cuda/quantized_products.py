"""How quantized layers multiply on a GPU: a product for each layout that has kernels."""

from __future__ import annotations

import torch

from engine.quant.layouts.base import Layout
from engine.quant.products import Form, LayoutProducts, Product


def cuda_layout_products(device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> LayoutProducts:
    """The products of a worker.

    Args:
        device, dtype: of its model.
        deterministic: have each token's result bitwise the same whatever else is in the step.
    """
    products: dict[type[Layout], Product] = {}
    forms: dict[type[Layout], Form] = {}
    return LayoutProducts(products, forms)
