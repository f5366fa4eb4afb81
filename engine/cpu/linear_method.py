"""Matrix products of the CPU."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear_method import DenseMethod


class PackedCpuMethod(DenseMethod):
    """Plain weights, repacked once for oneDNN's matrix product, which then skips repacking them every step.

    Falls back to DenseMethod where torch lacks the operators (see `is_available`).
    """

    # The number of tokens that oneDNN chooses the layout for; the product takes any number.
    BATCH_HINT = 256

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        """Whether this build of torch has the operators, and this processor can run them on the dtype: those
        of 16 bits take AVX-512 or more."""
        operators = torch.ops.mkldnn
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return False
        if not hasattr(operators, "_linear_pointwise"):
            return False
        if dtype is torch.bfloat16:
            return bool(operators._is_mkldnn_bf16_supported())
        if dtype is torch.float16:
            return bool(operators._is_mkldnn_fp16_supported())
        return True

    def finish_loading(self, layer: nn.Module) -> None:
        weight = layer.get_parameter("weight").detach()
        layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, self.BATCH_HINT)
        # The plain copy is not needed here any more; an embedding tied to it keeps its own reference.
        layer.register_parameter("weight", None)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, layer.packed_weight, bias, "none", [], ""
        )
        return product
