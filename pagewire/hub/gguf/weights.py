"""Writes the tensors of a GGUF file into one safetensors file, each in the format that its placement says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from pagewire.base.errors import ConfigError
from pagewire.base.gguf_blocks import METADATA_KEY
from pagewire.hub.gguf.layout import Arrangement, Placement, Source
from pagewire.hub.gguf.reader import GgufFile, GgufTensor
from pagewire.hub.progress import Advance

_CHUNK_VALUES = 1 << 20  # 4 MB of float32: amortises the calls and stays near the cache


# Makes a few megabytes of weights: where they go among all weights, in bytes, and what they are.
_Job = Callable[[], Iterable[tuple[int, npt.NDArray[Any]]]]


def weights_size(placements: Sequence[Placement]) -> int:
    """Bytes of all weights."""
    return sum(placement.nbytes for placement in placements)


def write_weights(gguf: GgufFile, placements: Sequence[Placement], target: Path, advance: Advance) -> None:
    """Writes model.safetensors, a few megabytes at a time.

    Raises:
        ConfigError: a tensor is of a type that cannot be dequantized.
    """
    header = _safetensors_header(placements)
    done = 0
    with target.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(header)
        file.flush()

        def convert(job: _Job) -> int:
            return sum(
                os.pwrite(file.fileno(), values.data.cast("B"), len(header) + offset)
                for offset, values in job()
            )

        for written in pool.map(convert, _jobs(gguf, placements)):
            done += written
            advance(done)
    expected = len(header) + weights_size(placements)
    if target.stat().st_size != expected:
        raise OSError(f"{target} has {target.stat().st_size} bytes after writing {expected}")


def _safetensors_header(placements: Sequence[Placement]) -> bytes:
    """The header of the safetensors format: its length, then JSON padded to 8 bytes."""
    blocks = {target.name: target.blocks for place in placements for target in place.targets if target.blocks}
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(blocks)} if blocks else {})
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for placement in placements:
        for target in placement.targets:
            begin, end = end, end + target.nbytes
            entries[target.name] = {
                "dtype": target.dtype,
                "shape": list(target.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _jobs(gguf: GgufFile, placements: Sequence[Placement]) -> Iterator[_Job]:
    offset = 0
    for placement in placements:
        if placement.arrangement is Arrangement.IN_TURN:
            yield from _jobs_of_rows(gguf, placement, offset)
        elif placement.arrangement is Arrangement.ALTERNATING:
            yield partial(_alternate, gguf, placement, offset)
        else:
            for expert in range(placement.targets[0].shape[0]):
                yield partial(_repack, placement, offset, expert)
        offset += placement.nbytes


def _jobs_of_rows(gguf: GgufFile, placement: Placement, offset: int) -> Iterator[_Job]:
    for source in placement.sources:
        rows = _unpaired(gguf, source)
        step = max(1, _CHUNK_VALUES // (math.prod(source.tensor.shape) // rows.shape[0]))
        source_bytes = placement.nbytes * math.prod(source.tensor.shape) // _num_values(placement)
        row_bytes = source_bytes // rows.shape[0]
        for first in range(0, rows.shape[0], step):
            chunk = rows[first : first + step]
            yield partial(_convert_rows, gguf, source, placement.targets[0].dtype, chunk, offset)
            offset += chunk.shape[0] * row_bytes


def _num_values(placement: Placement) -> int:
    return sum(math.prod(source.tensor.shape) for source in placement.sources)


def _convert_rows(
    gguf: GgufFile, source: Source, dtype: str, rows: npt.NDArray[np.uint8], offset: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    if dtype in ("U8", source.tensor.type.name) and not source.added:
        yield offset, np.ascontiguousarray(rows)
        return
    values = _dequantize(gguf, source.tensor, rows)
    if source.added:
        values = values + np.float32(source.added)  # not in place: they may be the file's
    yield offset, _to_bfloat16(values) if dtype == "BF16" else values


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of the numbers, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _alternate(gguf: GgufFile, placement: Placement, offset: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    parts = [_dequantize(gguf, source.tensor, source.tensor.data) for source in placement.sources]
    yield offset, np.stack(parts, axis=-1)


def _repack(placement: Placement, offset: int, expert: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """One expert's matrix. GGUF has each group of 32 as its exponent and 16 bytes, of which byte i holds the
    values i and i + 16; Hugging Face's byte i holds the values 2i and 2i + 1. The low half comes first."""
    blocks, scales = placement.targets
    _, rows, groups, width = blocks.shape
    out = rows // len(placement.sources)
    parts = [source.tensor.data[expert * out : (expert + 1) * out] for source in placement.sources]
    packed = np.stack(parts, axis=1).reshape(rows, groups, 1 + width)
    values = np.concatenate((packed[..., 1:] & 15, packed[..., 1:] >> 4), axis=-1)
    yield offset + expert * blocks.nbytes // blocks.shape[0], values[..., ::2] | values[..., 1::2] << 4
    at = offset + blocks.nbytes + expert * scales.nbytes // scales.shape[0]
    yield at, np.ascontiguousarray(packed[..., 0])


def _unpaired(gguf: GgufFile, source: Source) -> npt.NDArray[np.uint8]:
    """Undoes the row order that GGUF gives to q and k of Llama and its like.

    llama.cpp rotates neighbouring values (2i, 2i+1) of a head, Hugging Face's Llama the halves
    (i, i + head_dim/2). Rows are moved whole, so the quantized bytes can be moved as they are.
    """
    tensor, heads = source.tensor, source.paired_heads
    if heads == 0:
        return tensor.data
    count = tensor.shape[0]
    if len(tensor.shape) == 1 and GGML_QUANT_SIZES[tensor.type][0] != 1:
        raise ConfigError(
            f"{gguf.path}: tensor {tensor.name} is of type {tensor.type.name}; a bias must not be quantized"
        )
    paired = tensor.data.reshape(heads, count // heads // 2, 2, -1)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(tensor.data.shape)


def _dequantize(gguf: GgufFile, tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    # gguf works on 16 rows at a time; as the blocks lie one after another, longer rows mean fewer calls.
    _, type_size = GGML_QUANT_SIZES[tensor.type]
    blocks = raw.size // type_size
    per_row = next(size for size in (256, 64, 16, 4, 1) if blocks % size == 0)
    flat = np.ascontiguousarray(raw).reshape(blocks // per_row, per_row * type_size)
    try:
        with np.errstate(all="ignore"):  # damaged scales make infinities, which are for the model to show
            values = dequantize(flat, tensor.type)
    except NotImplementedError as error:
        raise ConfigError(
            f"{gguf.path}: tensor {tensor.name} is of type {tensor.type.name}, which cannot be dequantized"
        ) from error
    return np.ascontiguousarray(values, dtype="<f4").reshape(-1)
