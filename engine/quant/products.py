"""How a device multiplies by quantized weights: by kernels for the layouts that it has some for, by the
reference for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine.quant.layouts.base import Layout

# (layout, x [T, K], bias [N] or None) -> [T, N] of x's dtype.
Product = Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]
# A layout -> the same matrix as a device's kernels want it.
Form = Callable[[Any], Layout]


class LayoutProducts:
    """A device's products, by the class of the layout.

    Args:
        own: those that are not the reference's. One may look at the layout and the number of tokens and call
            `layout.multiply`, which is the reference.
        forms: layouts that are multiplied in another form, which is made once when they are loaded.
    """

    def __init__(
        self,
        own: Mapping[type[Layout], Product] | None = None,
        forms: Mapping[type[Layout], Form] | None = None,
    ) -> None:
        self._own, self._forms = dict(own or {}), dict(forms or {})

    def prepared(self, layout: Layout) -> Layout:
        """The layout in the form in which this device multiplies it; the layout itself may go."""
        form = self._forms.get(type(layout))
        return layout if form is None else form(layout)

    def multiply(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        product = self._own.get(type(layout))
        return layout.multiply(x, bias) if product is None else product(layout, x, bias)
