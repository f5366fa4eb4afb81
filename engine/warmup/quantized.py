"""Quantized layers on the meta device: which kernels they launch follows from their shapes."""

from __future__ import annotations

import torch

from engine.cuda.fp8_products import Fp8Products
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.layers.linear import LinearLayer
from engine.layers.weights import LoadableModule
from engine.models.base import CausalLM
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.methods.at_load import PlainWeight
from engine.quant.methods.base import QuantizedMethod
from engine.quant.schemes import Activations, AtLoad, Fp8


class RehearsedFp8(Fp8Products):
    """Leaves out torch's products, the first of which imports a computer algebra system."""

    def by_reference(
        self, layout: Fp8Channels | Fp8Blocks, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return x.new_empty(x.shape[0], layout.out_features)

    def by_torch(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        matrix: Fp8Matrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return scales.new_empty((codes.shape[0], matrix.codes.shape[0]), dtype=dtype)


def finish_loading(model: CausalLM) -> None:
    """As after weights were loaded."""
    linears = [module for module in model.modules() if isinstance(module, LinearLayer)]
    for linear in linears:
        for weight in linear.parameters(recurse=False):
            if isinstance(weight, PlainWeight):
                for part in linear.parts.values():
                    weight.kept[part.index] = _layout(AtLoad("fp8"), part.outputs.size, part.inputs.size)
    for module in model.modules():
        if isinstance(module, LinearLayer) and isinstance(module.method, QuantizedMethod):
            # Joining its matrices on the meta device imports a computer algebra system.
            [in_features, *_] = {part.inputs.size for part in module.parts.values()}
            layout = _layout(module.method.scheme, module.out_features, in_features)
            module.layouts = (layout,)  # type: ignore[assignment]
        elif isinstance(module, LoadableModule):
            module.finish_loading()


def _layout(scheme: Fp8 | AtLoad, out_features: int, in_features: int) -> Layout:
    """A matrix of e4m3 without numbers."""
    codes = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device="meta")
    if isinstance(scheme, Fp8) and scheme.scales == "block":
        outputs, inputs = scheme.block
        scales = torch.empty(-(-out_features // outputs), -(-in_features // inputs), device="meta")
        return Fp8Blocks(codes=codes, scales=scales, block=scheme.block, activations=scheme.activations)
    activations = scheme.activations if isinstance(scheme, Fp8) else Activations.TOKEN
    return Fp8Channels(
        codes=codes,
        scales=torch.empty(out_features, device="meta"),
        activations=activations,
        input_scale=torch.empty(1, device="meta") if activations is Activations.TENSOR else None,
    )
