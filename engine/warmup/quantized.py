"""Quantized layers of a rehearsal: of their weights there are only the shapes, in the form that the device
multiplies by."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from engine.config import WorkerConfig
from engine.cuda.fp8_experts import CudaFp8Experts
from engine.cuda.fp8_products import Fp8Products
from engine.cuda.quantized_experts import CudaQuantizedExperts, stacked
from engine.kernels.fp8.experts import Fp8ExpertMatrices
from engine.kernels.fp8.matrix import Fp8Matrix
from engine.layers.experts import ExpertMethod, ExpertShape, ExpertWeights
from engine.layers.linear import LinearLayer
from engine.layers.linear_method import LinearMethod, LinearMethods, LinearShape
from engine.layers.linear_weight import LinearWeight
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.quantized import with_quantized_layers
from engine.models.base import ModelContext
from engine.quant.layouts.base import Layout
from engine.quant.layouts.fp8 import Fp8Blocks, Fp8Channels
from engine.quant.layouts.int8 import Int8Channels
from engine.quant.layouts.table import ENTRIES, Outliers
from engine.quant.layouts.tiles import empty_tiles
from engine.quant.products import LayoutProducts
from engine.quant.schemes import (
    Activations,
    AtLoad,
    Awq,
    BnbInt8,
    BnbTable,
    Fp8,
    Gptq,
    Int8,
    PackedInts,
    Scheme,
    SqueezeLlm,
)
from engine.quant.sizes import AT_LOAD_GROUP_SIZES, BITS_KEPT, TABLE_GROUP
from pagewire.base.errors import PagewireError
from pagewire.hub import resolve_checkpoint

logger = logging.getLogger(__name__)


def with_rehearsed_layers(context: ModelContext, config: WorkerConfig) -> ModelContext:
    """The context with quantized layers that have no numbers; which layers are, the checkpoint says where it
    is there already."""
    quantization = context.config.quantization
    if quantization is None or not quantization.rules:
        return context
    products = context.layout_products
    return with_quantized_layers(
        context, _checkpoint(config), lambda scheme: RehearsedMethod(scheme, products)
    )


def _checkpoint(config: WorkerConfig) -> Checkpoint | None:
    try:
        directory, load_format = resolve_checkpoint(config.model, config.load_format)
        return None if load_format == "dummy" else open_checkpoint(directory)
    except PagewireError as error:
        logger.info("kernels are found without the checkpoint: %s", error)
        return None


class RehearsedMethod(LinearMethod):
    """The products of a scheme's layers, launched for weights that are not there."""

    def __init__(self, scheme: Scheme, products: LayoutProducts) -> None:
        self._scheme, self._products = scheme, products

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        layout = empty_layout(self._scheme, shape.out_features, shape.in_features)
        layer.layouts = (layout,)  # type: ignore[assignment]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layout = cast(Sequence[Layout], layer.layouts)[0]
        if self._products.covers(layout):
            return self._products.multiply(layout, x, bias)
        return x.new_empty(x.shape[0], layout.out_features)


class RehearsedExperts(CudaQuantizedExperts):
    """Experts of RehearsedMethods."""

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        # One expert tells what all are like.
        super().create_weights(weights, replace(shape, num_experts=1))
        linear = cast(Sequence[LinearLayer], weights.linears)[0]
        del weights.linears
        plain = linear._parameters.get("weight")
        if plain is not None:
            stack = plain.data.new_empty(shape.num_experts, *plain.shape)
            weights.register_parameter("weight", LinearWeight.make(stack))
        else:
            layouts = getattr(linear, "layouts", ())
            weights.words = stacked([layouts] * shape.num_experts, weights.layer_name)  # type: ignore[assignment]


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


class RehearsedFp8Experts(CudaFp8Experts):
    """Experts of e4m3 without numbers."""

    def for_matrices(self, methods: LinearMethods) -> ExpertMethod:
        return RehearsedFp8Experts(deterministic=self._deterministic, methods=methods)

    def create_weights(self, weights: ExpertWeights, shape: ExpertShape) -> None:
        super().create_weights(weights, replace(shape, num_experts=1))
        layout = cast(Sequence[Layout], cast(Sequence[LinearLayer], weights.linears)[0].layouts)[0]
        assert isinstance(layout, Fp8Channels | Fp8Blocks)
        del weights.linears

        def of_all(one: torch.Tensor) -> torch.Tensor:
            return one.new_empty(shape.num_experts, *one.shape)

        weights.matrices = Fp8ExpertMatrices(  # type: ignore[assignment]
            of_all(layout.codes),
            of_all(layout.scales),
            layout.block if isinstance(layout, Fp8Blocks) else None,
            layout.input_scale if isinstance(layout, Fp8Channels) else None,
            # Of the families with biases, none has experts of e4m3.
            None,
        )


def empty_layout(scheme: Scheme, n: int, k: int) -> Layout:
    """A matrix [n, k] as it is multiplied by, on the meta device."""
    device = torch.device("meta")

    def floats(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=device)

    def codes(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(n, k, dtype=dtype, device=device)

    def tiles(bits: int, group_size: int) -> Layout:
        return empty_tiles(bits, (n, k), group_size or k, table=None, device=device)

    match scheme:
        case Awq():
            return tiles(4, scheme.group_size)
        case Gptq() | PackedInts():
            return tiles(BITS_KEPT[scheme.bits], scheme.group_size)
        case BnbInt8() | Int8(activations=Activations.NONE) | AtLoad(kind="int8"):
            return tiles(8, 0)
        case AtLoad(kind="int4"):
            return tiles(4, next(size for size in AT_LOAD_GROUP_SIZES if k % size == 0))
        case BnbTable():
            return empty_tiles(4, (n, k), TABLE_GROUP, table=floats(1, ENTRIES), device=device)
        case SqueezeLlm():
            integers = torch.empty(n + 1, dtype=torch.int32, device=device)
            outliers = Outliers(row_starts=integers, columns=integers, values=floats(n), starts=())
            whole = empty_tiles(4, (n, k), k, table=floats(n, ENTRIES), device=device)
            return replace(whole, outliers=outliers)
        case Int8():
            is_static = scheme.activations is Activations.TENSOR
            integers = torch.empty(n, dtype=torch.int32, device=device)
            return Int8Channels(
                codes=codes(torch.int8),
                scales=floats(n),
                input_scale=floats(1) if is_static else None,
                input_zero=integers[:1] if scheme.zero_point else None,
                sums=integers if scheme.zero_point else None,
            )
        case Fp8(scales="block"):
            rows, columns = scheme.block
            return Fp8Blocks(
                codes=codes(torch.float8_e4m3fn),
                scales=floats(-(-n // rows), -(-k // columns)),
                block=scheme.block,
                activations=scheme.activations,
            )
    activations = scheme.activations if isinstance(scheme, Fp8) else Activations.TOKEN
    return Fp8Channels(
        codes=codes(torch.float8_e4m3fn),
        scales=floats(n),
        activations=activations,
        input_scale=floats(1) if activations is Activations.TENSOR else None,
    )
