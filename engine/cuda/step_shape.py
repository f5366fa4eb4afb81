"""The sizes of a step, and the layout of its columns in the one buffer that is copied to the device.

A step has `num_decodes` slots that compute and sample one token each, then `num_chunks` slots of requests
that compute a chunk of tokens, `num_chunk_tokens` in all. Slots of either kind may be padding: under a
captured graph the sizes are those of the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from engine.dispatch.sampling import COLUMNS, SCALARS

Column = TypeVar("Column", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step; the key of a captured graph.

    Attributes:
        num_decodes, num_chunks: request slots of either kind.
        num_chunk_tokens: token slots of all chunks.
        num_tiles: attention tiles of the chunks, or of all requests if attention treats decodes as chunks.
        shares_prefix: whether many of the decodes share a prefix that attention reads once.
        speculates: whether decodes may have drafts, which have slots of their own behind them.
        num_adapter_tiles: tiles of tokens with the same adapter; 0 where no request has an adapter, so that
            nothing is launched for them.
    """

    num_decodes: int
    num_chunks: int
    num_chunk_tokens: int
    num_tiles: int
    shares_prefix: bool = False
    speculates: bool = False
    num_adapter_tiles: int = 0

    @property
    def num_slots(self) -> int:
        """Request slots, each with room for one sampled token."""
        return self.num_decodes + self.num_chunks

    @property
    def num_tokens(self) -> int:
        """Token slots, decodes first."""
        return self.num_decodes + self.num_chunk_tokens

    @property
    def num_words(self) -> int:
        """32-bit words of the columns."""
        return max(end for _, _, end, _, _ in _places(self))


@dataclass(slots=True)
class StepColumns(Generic[Column]):
    """Views into a step's words, numpy's on the host or torch's on the device. S slots, decodes first.

    Attributes:
        result: which of the result buffers the step writes, [1].
        rows: the worker row of each slot, -1 for padding, [S].
        starts: position of the first token that each chunk computes, [num_chunks].
        query_start_loc: where each slot's tokens begin, and the end of the last, [S + 1].
        tile_request, tile_start: each attention tile's slot (-1 for padding) and the first of its tokens,
            [num_tiles].
        prefix_row, prefix_len: a row that begins with the prefix that decodes share, and its length; [1].
        prefix_lens: the prefix's length for each slot that shares it, 0 for others, [S].
        adapter_tokens: the tokens with adapters, those of one side by side, [T]; empty without adapters.
        adapter_slot, adapter_begin, adapter_end: each tile's adapter, -1 for padding, and its part of
            `adapter_tokens`, [num_adapter_tiles].
        logits_index: the last token of each slot, [S].
        sampling_rows: the row that samples in each slot, -1 where none does, [S].
        offsets, group_sizes: with speculation, which of its request's slots each is, counted from 0, and how
            many the request has, [S].
        room: with speculation, tokens that each slot's row may have before it computes another, [S].
        seeds: with speculation, of each slot's request, [S] int64; decodes get their draws by them.
        sampling: the parameters of SamplingRecord that the sampling kernel reads, by name, each [S].
        draws: a uniform number for each slot, [S] fp64.
    """

    result: Column
    rows: Column
    starts: Column
    query_start_loc: Column
    tile_request: Column
    tile_start: Column
    prefix_row: Column
    prefix_len: Column
    prefix_lens: Column
    adapter_tokens: Column
    adapter_slot: Column
    adapter_begin: Column
    adapter_end: Column
    logits_index: Column
    sampling_rows: Column
    draws: Column
    offsets: Column
    group_sizes: Column
    room: Column
    seeds: Column
    sampling: dict[str, Column]


def _layout(shape: StepShape) -> Iterator[tuple[str, int, str]]:
    """(column, number of elements, element type) of every column, in order."""
    slots = shape.num_slots
    yield "result", 1, "i4"
    yield "rows", slots, "i4"
    yield "starts", shape.num_chunks, "i4"
    yield "query_start_loc", slots + 1, "i4"
    yield "tile_request", shape.num_tiles, "i4"
    yield "tile_start", shape.num_tiles, "i4"
    yield "prefix_row", 1, "i4"
    yield "prefix_len", 1, "i4"
    yield "prefix_lens", slots, "i4"
    yield "adapter_tokens", shape.num_tokens if shape.num_adapter_tiles else 0, "i4"
    for name in ("adapter_slot", "adapter_begin", "adapter_end"):
        yield name, shape.num_adapter_tiles, "i4"
    yield "logits_index", slots, "i4"
    yield "sampling_rows", slots, "i4"
    yield "draws", slots, "f8"
    of_drafts = slots if shape.speculates else 0
    yield "offsets", of_drafts, "i4"
    yield "group_sizes", of_drafts, "i4"
    yield "room", of_drafts, "i4"
    yield "seeds", of_drafts, "i8"
    for name in COLUMNS:
        yield name, slots, SCALARS[name].lstrip("<")


def _places(shape: StepShape) -> Iterator[tuple[str, int, int, int, str]]:
    """(column, its first word, past its last word, number of elements, element type); each begins at a
    multiple of 16 bytes."""
    at = 0
    for name, length, kind in _layout(shape):
        words = -(-length * int(kind[1]) // 16) * 4
        yield name, at, at + words, length, kind
        at += words


_TORCH_KINDS = {"i4": torch.int32, "i8": torch.int64, "f4": torch.float32, "f8": torch.float64}


def host_columns(words: np.ndarray, shape: StepShape) -> StepColumns[np.ndarray]:
    """The columns in int32 words on the host."""
    return _named({name: words[a:b].view(kind)[:length] for name, a, b, length, kind in _places(shape)})


def device_columns(words: torch.Tensor, shape: StepShape) -> StepColumns[torch.Tensor]:
    """The columns in int32 words on the device."""
    return _named(
        {name: words[a:b].view(_TORCH_KINDS[kind])[:length] for name, a, b, length, kind in _places(shape)}
    )


def _named(arrays: dict[str, Column]) -> StepColumns[Column]:
    sampling = {name: arrays.pop(name) for name in COLUMNS}
    return StepColumns(sampling=sampling, **arrays)
