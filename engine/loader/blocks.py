"""Matrices in GGML's blocks, as checkpoints converted from GGUF files keep them: bytes [rows, bytes of a
row].

The formats are those of https://github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from safetensors import SafetensorError

from pagewire.base.gguf_blocks import KEPT, METADATA_KEY, block_size

# Of values that are unpacked at a time, which bounds the memory beside the result.
_CHUNK_VALUES = 1 << 22


def blocks_by_tensor(metadata: Mapping[str, str]) -> dict[str, str]:
    """Tensor name -> format, of those that a safetensors file's metadata say are in blocks.

    Raises:
        SafetensorError: the metadata are damaged, or name an unknown format.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        blocks = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its metadata's {METADATA_KEY} are not JSON") from error
    if not isinstance(blocks, dict):
        raise SafetensorError(f"its metadata's {METADATA_KEY} are not an object")
    for name, kind in blocks.items():
        if kind not in KEPT:
            raise SafetensorError(f"tensor {name!r} is in blocks of {kind!r}; known are {', '.join(KEPT)}")
    return blocks


def require_blocks(name: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    """Raises SafetensorError if a tensor cannot be a matrix in such blocks."""
    _, num_bytes = block_size(kind)
    if dtype != torch.uint8 or len(shape) != 2 or shape[1] % num_bytes:
        raise SafetensorError(
            f"tensor {name!r} is of {dtype} and shape {list(shape)}; a matrix in blocks of {kind} has rows "
            f"of bytes, a multiple of {num_bytes}"
        )


def dequantize(matrix: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a matrix in blocks, bytes [rows, bytes of a row] -> [rows, columns], computed in fp32,
    on the matrix's device."""
    values, num_bytes = block_size(kind)
    rows, row_bytes = matrix.shape
    out = torch.empty(rows, row_bytes // num_bytes * values, dtype=dtype, device=matrix.device)
    if matrix.is_meta:
        return out
    step = max(1, _CHUNK_VALUES // max(1, out.shape[1]))
    for first in range(0, rows, step):
        part = matrix[first : first + step]
        out[first : first + step] = _UNPACK[kind](part.reshape(-1, num_bytes)).view(len(part), -1)
    return out


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fp16 number at a byte of each block, [B, 1] fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """[B, n] bytes -> [B, 2 n]: all low halves, then all high ones."""
    return torch.cat((data & 15, data >> 4), dim=1)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """32 bits from a byte of each block on, [B, 32], as what they add to four: 0 or 16."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    return ((blocks[:, at : at + 4, None] >> shifts & 1) << 4).flatten(1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima in 12 bytes, [B, 12] -> twice [B, 8, 1] fp32: the low six bits of the first
    eight bytes hold those of the first four groups, their upper two bits and the last four bytes' halves the
    rest."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((scales & 63, rest & 15 | scales >> 6 << 4), dim=1)
    minimum = torch.cat((minima & 63, rest >> 4 | minima >> 6 << 4), dim=1)
    return scale.float().unsqueeze(2), minimum.float().unsqueeze(2)


def _with_minima(blocks: torch.Tensor, quants: torch.Tensor) -> torch.Tensor:
    """8 groups of 32 quants [B, 8, 32], each with a scale and a minimum."""
    scale, minimum = _six_bit_scales(blocks[:, 4:16])
    d, dmin = _half(blocks, 0).unsqueeze(2), _half(blocks, 2).unsqueeze(2)
    return ((d * scale) * quants - dmin * minimum).flatten(1)


def _pairs_of_groups(data: torch.Tensor) -> torch.Tensor:
    """128 bytes hold 8 groups of 32: each 32 bytes one group in the low halves, the next in the high ones."""
    halves = data.view(-1, 4, 32)
    return torch.stack((halves & 15, halves >> 4), dim=2).view(-1, 8, 32)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_minima(blocks, _pairs_of_groups(blocks[:, 16:].contiguous()))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8).view(1, 8, 1)
    fifth = (blocks[:, 16:48].unsqueeze(1) >> shifts & 1) << 4
    return _with_minima(blocks, _pairs_of_groups(blocks[:, 48:].contiguous()) | fifth)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    # Of each 128 values: 64 bytes with four low bits of two each, 32 bytes with two high bits of four each.
    low = blocks[:, :128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=blocks.device, dtype=torch.uint8).view(1, 1, 4, 1)
    low4 = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    quants = (low4 | (high >> shifts & 3) << 4).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).unsqueeze(2)
    return (_half(blocks, 208).unsqueeze(2) * scales * quants).flatten(1)


_UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
