"""Integers of a few bits in words of 32.

In files they are little-endian streams: value i is at bit i * bits of its row of words, and those of 3 bits
may lie across two words. In memory they are 2 or 4 bits, in an order that suits kernels; see `pack_words`.
"""

from __future__ import annotations

import torch

_WORD = 32
# As many values are unpacked at a time: each takes 8 bytes on the way.
_CHUNK_VALUES = 2**26


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """words int32 [R, W], each row a stream -> its first `count` values, uint8 [R, count]."""
    step = max(1, _CHUNK_VALUES // max(count, 1))
    unpack = _unpack_fields if _WORD % bits == 0 else _unpack_across
    parts = [unpack(words[begin : begin + step], bits, count) for begin in range(0, len(words), step)]
    return torch.cat(parts) if parts else words.new_empty(0, count, dtype=torch.uint8)


def _unpack_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    values: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).flatten(1)[:, :count]


def _unpack_across(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    begins = torch.arange(count, device=words.device) * bits
    index, shifts = begins // _WORD, begins % _WORD
    unsigned = words.long() & 0xFFFFFFFF
    next_index = (index + 1).clamp(max=words.shape[1] - 1)
    pairs: torch.Tensor = unsigned[:, index] | unsigned[:, next_index] << _WORD
    values: torch.Tensor = (pairs >> shifts) & (2**bits - 1)
    return values.to(torch.uint8)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values uint8 [N, K] -> words int32 [N, K * bits / 32], each of P = 32 / bits neighbours along K.

    Neighbour 2i is field i of its word, counted from the lowest bits, and 2i + 1 is field P / 2 + i. So
    `(word >> (bits * i)) & 0x000F000F` (0x00030003 for 2 bits) has two neighbours in its halves of 16 bits,
    in order, ready to become two 16-bit floats at once.
    """
    fields = _WORD // bits
    in_order = values.reshape(len(values), -1, fields // 2, 2).transpose(2, 3).flatten(2)
    words = torch.zeros(in_order.shape[:2], dtype=torch.int32, device=values.device)
    for field in range(fields):
        words |= in_order[..., field].int() << (bits * field)
    return words


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack_words` packed: words int32 [N, W] -> values int32 [N, W * 32 / bits]."""
    fields = _WORD // bits
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    values: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.view(*words.shape, 2, fields // 2).transpose(2, 3).flatten(1)
