"""Products with matrices in the number formats that checkpoints have them in, by the native kernels."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from engine.cpu.kernels.blocks import BLOCK_KINDS, BlockKind
from engine.cpu.kernels.library import NativeLibrary, PackedMatrix
from engine.layers.linear_method import FormatOf, LinearMethod, LinearMethods, LinearShape
from engine.layers.linear_weight import FeatureDim, LinearWeight

# Formats of single numbers, which torch has as a dtype.
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def format_dtype(kind: BlockKind) -> tuple[torch.dtype, FeatureDim]:
    """What a matrix in a format is kept in before it is packed, and how its last of two dimensions counts."""
    dtype = _DTYPES.get(kind.name)
    if dtype is None:
        return torch.uint8, FeatureDim(1, kind.columns, kind.num_bytes)
    return dtype, FeatureDim(1)


class NativeMethod(LinearMethod):
    """Weights in one format: rows as the checkpoint has them while they are loaded, panels afterwards."""

    def __init__(self, native: NativeLibrary, kind: BlockKind) -> None:
        self._native, self._kind = native, kind

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        dtype, inputs = format_dtype(self._kind)
        data = torch.empty(shape.out_features, inputs.count(shape.in_features), dtype=dtype)
        layer.register_parameter("weight", LinearWeight.make(data, output=FeatureDim(0), input=inputs))

    def finish_loading(self, layer: nn.Module) -> None:
        rows = layer.get_parameter("weight").detach().view(torch.uint8)
        columns = self._kind.num_columns(rows.shape[1])
        layer.packed = self._native.pack(self._kind, rows, columns)  # type: ignore[assignment]
        layer.register_parameter("weight", None)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._native.multiply(x, cast(PackedMatrix, layer.packed), bias)

    def look_up(self, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return self._native.embed(rows, cast(PackedMatrix, layer.packed))


class NativeMethods(LinearMethods):
    """The native method of each matrix's format where there is one; otherwise another."""

    def __init__(
        self, native: NativeLibrary, otherwise: LinearMethod, format_of: FormatOf | None = None
    ) -> None:
        self._native, self._otherwise, self._format_of = native, otherwise, format_of
        self._methods: dict[str, NativeMethod] = {}

    def for_matrix(self, layer: str, shard: str, *, changes: bool = False) -> LinearMethod:
        native = None if changes else self._native_method(layer, shard)
        return native or self._otherwise

    def for_table(self, name: str) -> LinearMethod | None:
        return self._native_method(name, "")

    def for_checkpoint(self, format_of: FormatOf) -> LinearMethods:
        return NativeMethods(self._native, self._otherwise, format_of)

    def _native_method(self, layer: str, shard: str) -> NativeMethod | None:
        kind = BLOCK_KINDS.get(self._format_of(layer, shard)) if self._format_of is not None else None
        if kind is None:
            return None
        return self._methods.setdefault(kind.name, NativeMethod(self._native, kind))
