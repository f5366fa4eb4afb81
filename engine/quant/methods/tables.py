"""bitsandbytes' 4 bits and SqueezeLLM: codes that number the entries of tables."""

from __future__ import annotations

import json
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.linear_method import LinearShape
from engine.layers.linear_weight import FeatureDim
from engine.layers.parallel import SplitError
from engine.quant.bits import pack_words, unpack_stream
from engine.quant.layouts.base import Layout
from engine.quant.layouts.table import BITS, ENTRIES, Outliers, TableWeights
from engine.quant.methods.base import (
    KeptTensors,
    Matrix,
    QuantizedMethod,
    parameter,
    register,
    require_multiple,
)
from engine.quant.schemes import BnbTable, SqueezeLlm
from engine.quant.sizes import TABLE_GROUP
from pagewire.base.errors import ConfigError

_NESTED_BLOCK = 256
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


class BnbTableMethod(QuantizedMethod[BnbTable]):
    """See schemes.BnbTable. weight is uint8 [N * K / 2, 1], the first of two in the high half of a byte;
    weight.absmax has a scale for each 64 of all N * K, fp32, or uint8 numbers of weight.nested_quant_map's
    entries, which weight.nested_absmax scales. weight.quant_map is the table, weight.quant_state a JSON
    object."""

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if inputs are split over ranks, or the sizes do not fill words."""
        if shape.in_features != shape.inputs.total:
            raise SplitError(
                f"{layer.layer_name}: bitsandbytes weights cannot be split over tensor-parallel ranks by "
                "their inputs; use one rank"
            )
        require_multiple(layer, "in_features of a bitsandbytes matrix", shape.in_features, 8)
        by_row = FeatureDim(0, 1, shape.in_features // 2)
        parameter(layer, "weight", (by_row.count(shape.out_features), 1), torch.uint8, output=by_row)
        count = len(shape.shards)
        parameter(layer, "weight.quant_map", (count, ENTRIES), torch.float32, per_shard=True)
        common = gcd(TABLE_GROUP, shape.in_features)
        by_block = FeatureDim(0, TABLE_GROUP // common, shape.in_features // common)
        blocks = sum(map(by_block.count, shape.shard_sizes))
        nested = self.scheme.nested
        absmax_dtype = torch.uint8 if nested else torch.float32
        parameter(layer, "weight.absmax", (blocks,), absmax_dtype, output=by_block, is_scale=not nested)
        if nested:
            parameter(layer, "weight.nested_quant_map", (count, 256), torch.float32, per_shard=True)
            register(layer, "weight.nested_absmax", KeptTensors.of(torch.float32))
        state = self.first_stored(layer, shape, *(f"weight.{name}" for name in _STATES))
        if self.is_stored(layer, shape, state):
            register(layer, state, KeptTensors.of(torch.uint8))

    def convert(self, matrix: Matrix) -> Layout:
        tensors, out_features, in_features = matrix.tensors, matrix.out_features, matrix.in_features
        state = _read_state(matrix)
        for name, needed in (("blocksize", TABLE_GROUP), ("nested_blocksize", _NESTED_BLOCK)):
            if state.get(name, needed) != needed:
                raise ConfigError(
                    f"{matrix.where}: bitsandbytes: {name} is {state[name]}; supported is {needed}"
                )
        halves = tensors["weight"].view(out_features, in_features // 2)
        codes = torch.stack((halves >> 4, halves & 15), -1).flatten(1)
        absmax = tensors["weight.absmax"]
        if self.scheme.nested:
            absmax = _unnested(absmax, matrix, state.get("nested_offset", 0.0))
        # Blocks run over the ends of rows where 64 does not divide them: their common divisor does.
        group_size = gcd(TABLE_GROUP, in_features)
        scales = absmax.float().repeat_interleave(TABLE_GROUP // group_size)[: codes.numel() // group_size]
        return TableWeights(
            words=pack_words(codes, BITS),
            table=tensors["weight.quant_map"].float().view(1, ENTRIES),
            scales=scales.view(out_features, -1).T.contiguous(),
            group_size=group_size,
            outliers=None,
        )


def _read_state(matrix: Matrix) -> dict[str, Any]:
    for name in _STATES:
        stored = matrix.tensors.get(f"weight.{name}")
        if stored is None:
            continue
        try:
            state = json.loads(bytes(stored.cpu().tolist()))
        except ValueError as error:
            raise ConfigError(f"{matrix.where}: weight.{name} is not JSON: {error}") from error
        if isinstance(state, dict):
            return state
        raise ConfigError(f"{matrix.where}: weight.{name} is no JSON object")
    return {}


def _unnested(absmax: torch.Tensor, matrix: Matrix, offset: object) -> torch.Tensor:
    """uint8 [blocks] -> fp32 [blocks]."""
    values = matrix.tensors["weight.nested_quant_map"].view(-1)[absmax.int()]
    nested = matrix.tensors.get("weight.nested_absmax")
    if nested is None:
        return values
    if not isinstance(offset, int | float) or nested.numel() * _NESTED_BLOCK < len(values):
        raise ConfigError(
            f"{matrix.where}: bitsandbytes: nested_offset is {offset!r}, and weight.nested_absmax has "
            f"{nested.numel()} scales for {len(values)} blocks"
        )
    return values * nested.view(-1).repeat_interleave(_NESTED_BLOCK)[: len(values)] + offset


class SqueezeLlmMethod(QuantizedMethod[SqueezeLlm]):
    """See schemes.SqueezeLlm. qweight int32 [K * bits / 32, N] is packed along the input, lookup_table is
    [N, 2 ** bits]. Outliers: rows int32 [N + 1], cols int32 [count] and vals fp32 [count] in CSR form, and
    whole outputs full_rows [K, count], those of full_row_indices int32 [count]."""

    _SPARSE = ("rows", "cols", "vals", "startrows", "full_rows", "full_row_indices")

    def create_weights(self, layer: nn.Module, shape: LinearShape) -> None:
        """Raises SplitError if the sizes do not fill words, or ranks would split outliers."""
        bits = self.scheme.bits
        in_words = FeatureDim(0, 32, bits)
        require_multiple(layer, "in_features of a SqueezeLLM matrix", shape.in_features, 32)
        sizes = (in_words.count(shape.in_features), shape.out_features)
        parameter(layer, "qweight", sizes, torch.int32, input=in_words, output=FeatureDim(1))
        sizes = (shape.out_features, 2**bits)
        parameter(layer, "lookup_table", sizes, torch.float32, output=FeatureDim(0))
        for name in self._SPARSE:
            if self.is_stored(layer, shape, name):
                dtype = torch.float32 if name in ("vals", "full_rows") else torch.int32
                register(layer, name, KeptTensors.of(dtype))

    def convert(self, matrix: Matrix) -> Layout:
        tensors, bits = matrix.tensors, self.scheme.bits
        codes = unpack_stream(tensors["qweight"].T.contiguous(), bits, matrix.in_features)
        table = F.pad(tensors["lookup_table"].float(), (0, ENTRIES - 2**bits))
        return TableWeights(
            words=pack_words(codes, BITS),
            table=table,
            scales=None,
            group_size=matrix.in_features,
            outliers=_outliers(matrix),
        )


def _outliers(matrix: Matrix) -> Outliers | None:
    """The sparse part and the whole outputs as one, sorted by output and input."""
    tensors, size = matrix.tensors, (matrix.out_features, matrix.in_features)
    places, values = [], []
    if "vals" in tensors:
        starts, columns = tensors["rows"], tensors["cols"]
        if tensors["vals"].dim() != 1 or not _is_csr(starts, columns, len(tensors["vals"]), size):
            raise ConfigError(f"{matrix.where}: rows, cols and vals are no sparse matrix of {list(size)}")
        outputs = torch.repeat_interleave(starts.diff().long(), output_size=len(columns))
        places.append(outputs * size[1] + columns)
        values.append(tensors["vals"].float())
    if "full_rows" in tensors:
        outputs, full = tensors["full_row_indices"].long(), tensors["full_rows"].float().T
        if full.shape != (len(outputs), size[1]) or bool(((outputs < 0) | (outputs >= size[0])).any()):
            raise ConfigError(f"{matrix.where}: full_rows are no outputs of a matrix of {list(size)}")
        inputs = torch.arange(size[1], device=outputs.device)
        places.append((outputs[:, None] * size[1] + inputs).flatten())
        values.append(full.flatten())
    if not places:
        return None
    place, order = torch.cat(places).sort(stable=True)
    counts = torch.bincount(place // size[1], minlength=size[0]).cumsum(0)
    starts = F.pad(counts, (1, 0)).int()
    return Outliers.make(starts, (place % size[1]).int(), torch.cat(values)[order])


def _is_csr(starts: torch.Tensor, columns: torch.Tensor, count: int, size: tuple[int, int]) -> bool:
    if starts.shape != (size[0] + 1,) or columns.shape != (count,):
        return False
    in_order = bool((starts.diff() >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) == count
    return in_order and (count == 0 or (int(columns.min()) >= 0 and int(columns.max()) < size[1]))
