"""Plain weights that are quantized as they are read: each matrix on its own, so that no more than one is in
full precision at a time."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import FeatureDim, MatrixPart
from engine.quant.bits import pack_words
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import LARGEST, Fp8Channels, to_fp8
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.methods.base import (
    KeptTensors,
    Matrix,
    QuantizedMethod,
    require_multiple,
    require_shape,
)
from engine.quant.schemes import Activations, AtLoad

GROUP_SIZES = (128, 32)
_LARGEST_INT4, _LARGEST_INT8 = 15, 127
_SMALLEST_SCALE = 1e-12


class PlainWeight(KeptTensors):
    """A matrix that is quantized as it is loaded. Ranks may split it.

    Attributes:
        kind: see schemes.AtLoad.
        dtype_of_scales: of int4's scales.
    """

    kind: str
    dtype_of_scales: torch.dtype

    def require_loadable(self, parts: object, where: str) -> None:
        """Has a place for any part."""

    def load(self, tensor: torch.Tensor, part: MatrixPart) -> None:
        tensor = FeatureDim(0).take(tensor, part.outputs)
        tensor = FeatureDim(1).take(tensor, part.inputs)
        require_shape(tensor, (part.outputs.size, part.inputs.size))
        if not tensor.is_meta:
            self.quantize(tensor.to(self.device_of_layer), part)

    def quantize(self, values: torch.Tensor, part: MatrixPart) -> None:
        """Quantizes this rank's part of a matrix."""
        self.kept[part.index] = quantized(values.float(), self.kind, self.dtype_of_scales)


class AtLoadMethod(QuantizedMethod[AtLoad]):
    """See schemes.AtLoad."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if the inputs do not fill groups."""
        if self.scheme.kind == "int4":
            require_multiple(layer, "in_features of int4 made at load", shape.in_features, GROUP_SIZES[-1])
        dtype = torch.get_default_dtype()
        weight = PlainWeight.of(dtype, shape.out_features, shape.in_features)
        weight.kind, weight.dtype_of_scales = self.scheme.kind, dtype
        layer.register_parameter("weight", weight)

    def convert(self, matrix: Matrix) -> Layout:
        """Matrices are layouts already."""
        raise NotImplementedError

    def finish_loading(self, layer: nn.Module) -> None:
        weight = cast(PlainWeight, layer.get_parameter("weight"))
        layouts = [weight.kept[index] for index in sorted(weight.kept)]
        layer.register_parameter("weight", None)
        self.keep(layer, layouts)


def quantized(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> Layout:
    """A matrix [N, K] fp32 rounded to nearest.

    Args:
        kind: "int8", "int4" or "fp8"; see schemes.AtLoad.
        dtype: of int4's scales.
    """
    if kind == "int4":
        return _int4(weight, dtype)
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        scales = (largest / _LARGEST_INT8).clamp(min=_SMALLEST_SCALE)
        return Int8Groups(
            codes=(weight / scales).round().to(torch.int8),
            scales=scales.T.contiguous(),
            group_size=weight.shape[1],
            zeros=None,
            zero_point=0,
            order=None,
        )
    scales = (largest / LARGEST).clamp(min=_SMALLEST_SCALE)
    return Fp8Channels(
        codes=to_fp8(weight / scales),
        scales=scales.view(-1),
        activations=Activations.TOKEN,
        input_scale=None,
    )


def _int4(weight: torch.Tensor, dtype: torch.dtype) -> PackedGroups:
    """Zero itself is exact: it is among what a group's scale and zero point span."""
    in_features = weight.shape[1]
    group_size = next(size for size in GROUP_SIZES if in_features % size == 0)
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / _LARGEST_INT4).clamp(min=torch.finfo(dtype).tiny * 2**4).to(dtype)
    exact = scales.float()
    zeros = (-low / exact).round().clamp(0, _LARGEST_INT4)
    codes = ((groups / exact[..., None]).round() + zeros[..., None]).clamp(0, _LARGEST_INT4)
    return PackedGroups(
        bits=4,
        words=pack_words(codes.to(torch.uint8).flatten(1), 4),
        scales=scales.T.contiguous(),
        group_size=group_size,
        zeros=zeros.to(torch.uint8).T.contiguous(),
        zero_point=8,
        order=None,
    )
