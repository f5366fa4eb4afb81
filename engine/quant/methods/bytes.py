"""int8 and FP8: compressed-tensors' int-quantized and float-quantized, FP8 checkpoints, LLM.int8."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import FeatureDim
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.layouts.groups import Int8Groups
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.methods.base import (
    Matrix,
    QuantizedMethod,
    count_outputs,
    parameter,
)
from engine.quant.schemes import Activations, BnbInt8, Fp8, Int8

# Two names that files have for the same.
_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale")
_LARGEST_INT8 = 127.0


def _scales(layer: nn.Module, name: str, shape: LinearShape, *, per_tensor: bool, rank_2: bool) -> None:
    """Registers a scale for each output, [N] or [N, 1], or one for each matrix, all in fp32."""
    if per_tensor:
        parameter(layer, name, (len(shape.shards),), torch.float32, per_shard=True, is_scale=True)
        return
    sizes = (shape.out_features, 1) if rank_2 else (shape.out_features,)
    parameter(layer, name, sizes, torch.float32, output=FeatureDim(0), is_scale=True)


def _each_output(scales: torch.Tensor, out_features: int) -> torch.Tensor:
    """A scale for each output, fp32 [N]."""
    return scales.float().reshape(-1).expand(out_features).contiguous()


class Int8Method(QuantizedMethod[Int8]):
    """See schemes.Int8. weight is int8 [N, K], weight_scale [N, 1] or [1]; static activations have
    input_scale [1], and input_zero_point [1] where they are asymmetric."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        _register_codes(layer, shape, torch.int8)
        found = self.shape_of(layer, shape, "weight_scale")
        rank_2 = found is None or len(found) == 2
        _scales(layer, "weight_scale", shape, per_tensor=self.scheme.per_tensor, rank_2=rank_2)
        if self.scheme.activations is Activations.TENSOR:
            parameter(
                layer, "input_scale", (len(shape.shards),), torch.float32, per_shard=True, is_scale=True
            )
            if self.scheme.zero_point:
                dtype = self.stored_dtype(layer, shape, "input_zero_point") or torch.int8
                parameter(layer, "input_zero_point", (len(shape.shards),), dtype, per_shard=True)

    def convert(self, matrix: Matrix) -> Layout:
        codes, tensors = matrix.tensors["weight"], matrix.tensors
        scales = _each_output(tensors["weight_scale"], matrix.out_features)
        if self.scheme.activations is Activations.NONE:
            return _one_group(codes, scales)
        zero = tensors["input_zero_point"].int().view(1) if self.scheme.zero_point else None
        return Int8Channels(
            codes=codes.contiguous(),
            scales=scales,
            input_scale=_input_scale(tensors, "input_scale"),
            input_zero=zero,
            sums=None if zero is None else codes.sum(1, dtype=torch.int32),
        )


def _register_codes(layer: nn.Module, shape: LinearShape, dtype: torch.dtype) -> None:
    sizes = (shape.out_features, shape.in_features)
    parameter(layer, "weight", sizes, dtype, output=FeatureDim(0), input=FeatureDim(1))


def _one_group(codes: torch.Tensor, scales: torch.Tensor) -> Int8Groups:
    """int8 with a scale for each output, multiplied by inputs of the model's dtype."""
    return Int8Groups(
        codes=codes.contiguous(),
        scales=scales.view(1, -1),
        group_size=codes.shape[1],
        zeros=None,
        zero_point=0,
        order=None,
    )


def _input_scale(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    scale = tensors.get(name)
    return None if scale is None else scale.float().reshape(1)


class Fp8Method(QuantizedMethod[Fp8]):
    """See schemes.Fp8. weight is float8_e4m3fn [N, K]; weight_scale, or weight_scale_inv, which is no inverse
    either, is [1], [N, 1] or [ceil(N / block), ceil(K / block)]. Static activations have input_scale, or
    activation_scale, [1]."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        scheme = self.scheme
        _register_codes(layer, shape, torch.float8_e4m3fn)
        name = self.first_stored(layer, shape, *_SCALES)
        if scheme.scales == "block":
            outputs, inputs = FeatureDim(0, scheme.block[0]), FeatureDim(1, scheme.block[1])
            sizes = count_outputs(shape, outputs), inputs.count(shape.in_features)
            parameter(layer, name, sizes, torch.float32, output=outputs, input=inputs, is_scale=True)
        else:
            found = self.shape_of(layer, shape, name)
            # Some files of the "fp8" method have a scale for each output, which they do not say.
            per_tensor = scheme.scales == "tensor" if found is None else math.prod(found) == 1
            rank_2 = found is None or len(found) == 2
            _scales(layer, name, shape, per_tensor=per_tensor, rank_2=rank_2)
        if scheme.activations is Activations.TENSOR:
            own = self.first_stored(layer, shape, *_INPUT_SCALES)
            parameter(layer, own, (len(shape.shards),), torch.float32, per_shard=True, is_scale=True)

    def convert(self, matrix: Matrix) -> Layout:
        tensors, scheme = matrix.tensors, self.scheme
        codes = tensors["weight"]
        scales = next(tensors[name] for name in _SCALES if name in tensors)
        if scheme.scales == "block":
            return Fp8Blocks(
                codes=codes, scales=scales.contiguous(), block=scheme.block, activations=scheme.activations
            )
        static = next((name for name in _INPUT_SCALES if name in tensors), "")
        return Fp8Channels(
            codes=codes,
            scales=_each_output(scales, matrix.out_features),
            activations=scheme.activations,
            input_scale=_input_scale(tensors, static),
        )


class BnbInt8Method(QuantizedMethod[BnbInt8]):
    """See schemes.BnbInt8. weight is int8 [N, K], SCB fp32 [N]: the largest magnitude of each output."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        _register_codes(layer, shape, torch.int8)
        _scales(layer, "SCB", shape, per_tensor=False, rank_2=False)
        if self.is_stored(layer, shape, "weight_format"):
            dtype = self.stored_dtype(layer, shape, "weight_format") or torch.uint8
            parameter(layer, "weight_format", (len(shape.shards),), dtype, per_shard=True)

    def convert(self, matrix: Matrix) -> Layout:
        return _one_group(matrix.tensors["weight"], matrix.tensors["SCB"].float() / _LARGEST_INT8)
