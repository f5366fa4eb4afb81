"""AWQ, GPTQ and compressed-tensors' packed integers: all become groups of integers."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import nn

from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import FeatureDim
from engine.quant.bits import pack_words, unpack_stream
from engine.quant.layouts.base import Layout
from engine.quant.layouts.groups import Int8Groups, PackedGroups
from engine.quant.methods.base import (
    Matrix,
    QuantizedMethod,
    count_outputs,
    parameter,
    require_multiple,
)
from engine.quant.schemes import Awq, Gptq, PackedInts
from engine.quant.sizes import BITS_KEPT
from pagewire.base.errors import ConfigError

_WORD = 32
# The column of each of a word's values in AutoAWQ's order.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# Scales are computed with in the dtype that files have them in, where it is one of these.
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def grouped(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    order: torch.Tensor | None = None,
) -> Layout:
    """Integers without a sign as a layout.

    Args:
        values: uint8 [N, K].
        scales: [G, N].
        zeros: uint8 [G, N]; None for 2 ** (bits - 1) throughout.
        group_size: inputs that share a scale.
        order: see GroupedInts.
    """
    zero_point = 2 ** (bits - 1)
    if zeros is not None and bool((zeros == zero_point).all()):
        zeros = None
    kept = BITS_KEPT[bits]
    scales = scales.contiguous()
    if kept < 8:
        return PackedGroups(
            bits=kept,
            words=pack_words(values, kept),
            scales=scales,
            group_size=group_size,
            zeros=zeros,
            zero_point=zero_point,
            order=order,
        )
    return Int8Groups(
        codes=_signed(values),
        scales=scales,
        group_size=group_size,
        zeros=None if zeros is None else _signed(zeros),
        zero_point=0,
        order=order,
    )


def _signed(values: torch.Tensor) -> torch.Tensor:
    """uint8 values less 128, int8."""
    return (values ^ 128).view(torch.int8)


def in_groups(g_idx: torch.Tensor, group_size: int, where: str) -> torch.Tensor | None:
    """The order of inputs in which groups are neighbours, int32 [K]; None where they are already.

    Args:
        g_idx: the group of each input, [K].

    Raises:
        ConfigError: groups are not of this size.
    """
    groups = torch.arange(len(g_idx), device=g_idx.device) // group_size
    if torch.equal(g_idx.long(), groups):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].long(), groups):
        raise ConfigError(f"{where}: its g_idx does not make groups of {group_size} inputs each")
    return order.int()


def _stream(dim: int, bits: int) -> FeatureDim:
    """A dimension of words that hold a stream of values: as many as fill words exactly stay together."""
    features = _WORD // gcd(_WORD, bits)
    return FeatureDim(dim, features, features * bits // _WORD)


def _groups(dim: int, scheme: Awq | Gptq | PackedInts, shape: LinearShape) -> tuple[FeatureDim | None, int]:
    """A dimension with an entry for each group of inputs, and how many there are on this rank. One group for
    all inputs belongs to every rank."""
    group_size = scheme.group_size
    if not group_size:
        return None, 1
    num_groups = -(-shape.in_features // group_size)
    # With act-order a rank's inputs may be of any group, so that groups cannot be split.
    if _is_ordered(scheme):
        return FeatureDim(dim, shape.inputs.total, num_groups), num_groups
    return FeatureDim(dim, group_size), num_groups


def _is_ordered(scheme: Awq | Gptq | PackedInts) -> bool:
    if isinstance(scheme, Gptq):
        return scheme.desc_act
    return isinstance(scheme, PackedInts) and scheme.ordered


def _scale_dtype(
    method: QuantizedMethod[Any], layer: nn.Module, shape: LinearShape, name: str
) -> torch.dtype:
    """The dtype in which the layer's scales are stored; the model's own where it is no plain one."""
    stored = method.stored_dtype(layer, shape, name)
    return stored if stored in _SCALE_DTYPES else torch.get_default_dtype()


class AwqMethod(QuantizedMethod[Awq]):
    """See schemes.Awq. qweight int32 [K, N / 8] and qzeros int32 [G, N / 8] are packed along the output,
    scales are [G, N]."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if the sizes do not fill words."""
        for size in shape.shard_sizes:
            require_multiple(layer, "out_features of an AWQ matrix", size, 8)
        require_multiple(layer, "in_features of an AWQ matrix", shape.in_features, 8)
        by_group, groups = _groups(0, self.scheme, shape)
        by_word, words = _stream(1, 4), shape.out_features // 8
        parameter(
            layer, "qweight", (shape.in_features, words), torch.int32, input=FeatureDim(0), output=by_word
        )
        if self.scheme.zero_point or self.is_stored(layer, shape, "qzeros"):
            parameter(layer, "qzeros", (groups, words), torch.int32, input=by_group, output=by_word)
        parameter(
            layer,
            "scales",
            (groups, shape.out_features),
            _scale_dtype(self, layer, shape, "scales"),
            input=by_group,
            output=FeatureDim(1),
            is_scale=True,
        )

    def convert(self, matrix: Matrix) -> Layout:
        tensors = matrix.tensors
        zeros = _from_awq(tensors["qzeros"]) if self.scheme.zero_point else None
        return grouped(
            _from_awq(tensors["qweight"]).T,
            tensors["scales"],
            zeros,
            bits=4,
            group_size=self.scheme.group_size or matrix.in_features,
        )


def _from_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] in AutoAWQ's order -> uint8 [R, N]."""
    in_words = unpack_stream(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    values = torch.empty_like(in_words)
    values[..., list(_AWQ_COLUMNS)] = in_words
    return values.flatten(1)


class GptqMethod(QuantizedMethod[Gptq]):
    """See schemes.Gptq. qweight int32 [K * bits / 32, N] is packed along the input, qzeros int32
    [G, N * bits / 32] along the output; scales are [G, N], g_idx int32 [K]."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if the sizes do not fill words."""
        scheme = self.scheme
        in_words = _stream(0, scheme.bits)
        require_multiple(layer, "in_features of a GPTQ matrix", shape.in_features, in_words.features)
        count = in_words.count(shape.in_features)
        parameter(
            layer, "qweight", (count, shape.out_features), torch.int32, input=in_words, output=FeatureDim(1)
        )
        by_group, num_groups = _groups(0, scheme, shape)
        if self.is_stored(layer, shape, "qzeros") or not scheme.symmetric:
            by_word = _stream(1, scheme.bits)
            for size in shape.shard_sizes:
                require_multiple(layer, "out_features of a GPTQ matrix", size, by_word.features)
            words = count_outputs(shape, by_word)
            parameter(layer, "qzeros", (num_groups, words), torch.int32, input=by_group, output=by_word)
        parameter(
            layer,
            "scales",
            (num_groups, shape.out_features),
            _scale_dtype(self, layer, shape, "scales"),
            input=by_group,
            output=FeatureDim(1),
            is_scale=True,
        )
        if self.is_stored(layer, shape, "g_idx"):
            sizes = (len(shape.shards), shape.in_features)
            parameter(layer, "g_idx", sizes, torch.int32, input=FeatureDim(0), per_shard=True)

    def convert(self, matrix: Matrix) -> Layout:
        bits, tensors = self.scheme.bits, matrix.tensors
        group_size = self.scheme.group_size or matrix.in_features
        values = unpack_stream(tensors["qweight"].T.contiguous(), bits, matrix.in_features)
        order = None
        if "g_idx" in tensors:
            g_idx = tensors["g_idx"]
            order = in_groups(g_idx - g_idx.min(), group_size, matrix.where)
        if order is not None:
            values = values[:, order]
        zeros = None
        if "qzeros" in tensors:
            zeros = unpack_stream(tensors["qzeros"], bits, matrix.out_features)
            if self.scheme.stored_less_one:
                zeros = (zeros + 1) & (2**bits - 1)
        return grouped(values, tensors["scales"], zeros, bits=bits, group_size=group_size, order=order)


class PackedIntsMethod(QuantizedMethod[PackedInts]):
    """See schemes.PackedInts. weight_packed int32 [N, K * bits / 32] is packed along the input,
    weight_zero_point int32 [N * bits / 32, G] along the output; weight_scale is [N, G], weight_g_idx int32
    [K]. Values and zero points are stored 2 ** (bits - 1) larger than they are."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if the sizes do not fill words."""
        scheme = self.scheme
        require_multiple(layer, "in_features of packed weights", shape.in_features, 8)
        in_words = _stream(1, scheme.bits)
        count = in_words.count(shape.in_features)
        parameter(
            layer,
            "weight_packed",
            (shape.out_features, count),
            torch.int32,
            input=in_words,
            output=FeatureDim(0),
        )
        by_group, num_groups = _groups(1, scheme, shape)
        parameter(
            layer,
            "weight_scale",
            (shape.out_features, num_groups),
            _scale_dtype(self, layer, shape, "weight_scale"),
            input=by_group,
            output=FeatureDim(0),
            is_scale=True,
        )
        if not scheme.symmetric:
            by_word = _stream(0, scheme.bits)
            for size in shape.shard_sizes:
                require_multiple(layer, "out_features with packed zero points", size, by_word.features)
            sizes = (count_outputs(shape, by_word), num_groups)
            parameter(layer, "weight_zero_point", sizes, torch.int32, input=by_group, output=by_word)
        if self.is_stored(layer, shape, "weight_g_idx"):
            sizes = (len(shape.shards), shape.in_features)
            parameter(layer, "weight_g_idx", sizes, torch.int32, input=FeatureDim(0), per_shard=True)
        if self.is_stored(layer, shape, "weight_shape"):
            dtype = self.stored_dtype(layer, shape, "weight_shape") or torch.int64
            parameter(layer, "weight_shape", (len(shape.shards), 2), dtype, per_shard=True)

    def convert(self, matrix: Matrix) -> Layout:
        bits, tensors = self.scheme.bits, matrix.tensors
        group_size = self.scheme.group_size or matrix.in_features
        values = unpack_stream(tensors["weight_packed"], bits, matrix.in_features)
        order = None
        if "weight_g_idx" in tensors:
            order = in_groups(tensors["weight_g_idx"], group_size, matrix.where)
        if order is not None:
            values = values[:, order]
        zeros = None
        if "weight_zero_point" in tensors:
            packed = tensors["weight_zero_point"].T.contiguous()
            zeros = unpack_stream(packed, bits, matrix.out_features)
        scales = tensors["weight_scale"].T
        return grouped(values, scales, zeros, bits=bits, group_size=group_size, order=order)
