"""What an attention backend is given and what it must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class LayerKVCache:
    """One layer's keys and values, each [num_blocks, block_size, num_kv_heads, head_dim].

    Owned by the worker's KV pool; written by the attention layer, read by the backend.

    Attributes:
        scales: what the numbers of keys and of values are to be multiplied with, fp32 [2]; None where they
            are of the model's dtype.
    """

    key: torch.Tensor
    value: torch.Tensor
    scales: torch.Tensor | None = None

    def store(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Writes key and value [T, num_kv_heads, head_dim] to their slots."""
        self.key.flatten(0, 1).index_copy_(0, slot_mapping, key)
        self.value.flatten(0, 1).index_copy_(0, slot_mapping, value)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """The heads of one attention layer on this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMSNorm of every query and key head before rotation (Qwen3).

    Attributes:
        query, key: weights, [head_dim].
        eps: of both.
    """

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """The rotary angles (arXiv:2104.09864) of layers that rotate alike. R channels of a head are rotated.

    Attributes:
        angles: cosines of each position's R/2 pairs of channels, then sines, [max_positions, R] fp32.
        interleaved: whether channel 2i pairs with 2i + 1, as in GPT-J; else i pairs with i + R/2.
        query_scale: what queries of each position are multiplied with as well, [max_positions] fp32; None
            for nothing.
    """

    angles: torch.Tensor
    interleaved: bool = False
    query_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """What one attention layer computes: softmax over its keys of the scores, which are, in this order,

        q.k * scale                           the scores
        soft_cap * tanh(scores / soft_cap)    if there is a cap (Gemma 2)
        scores - alibi_slope * distance       if there are slopes (arXiv:2108.12409)

    Attributes:
        scale: positive.
        sliding_window: a token sees itself and this number less one before it; 0 for no limit.
        soft_cap: the bound of the scores; 0 for none.
        alibi_slopes: for each query head on this rank, [H] fp32. The distance is in tokens.
        sinks: for each query head on this rank, one more score, as of a key whose value is zero, [H]
            (arXiv:2309.17453, as gpt-oss learns it). It is neither scaled nor capped.
    """

    scale: float
    sliding_window: int = 0
    soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class Rotation:
    """The rotary angles of a step's tokens, in whatever form its backend made them."""


@dataclass(frozen=True)
class BatchLayout:
    """Which tokens a step computes, on the host. S requests, T tokens, each request's tokens together.

    The runner puts requests that compute one token first, longest context first.

    Attributes:
        counts: tokens computed for each request, [S].
        seq_lens: its context including these tokens, [S].
        block_table: its KV block ids in sequence order, [S, at least the blocks of the longest]. Entries
            past a request's own blocks are arbitrary, and so are those behind the window of layers that have
            one.
        slot_mapping: block_id * block_size + offset of each token, [T].
        block_size: tokens per block.
    """

    counts: IntArray
    seq_lens: IntArray
    block_table: IntArray
    slot_mapping: IntArray
    block_size: int

    @cached_property
    def num_decodes(self) -> int:
        """How many requests, all at the front, compute exactly one token."""
        return int((self.counts == 1).sum())


@dataclass(slots=True)
class AttentionMetadata:
    """The layout of a step on the device, the same for every layer. Backends add their own fields.

    Attributes:
        slot_mapping: block_id * block_size + offset of each token, [T].
    """

    slot_mapping: torch.Tensor


class AttentionBackend(ABC):
    """One way to attend over paged keys and values. Shared by all layers; holds no request state."""

    @abstractmethod
    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> Rotation:
        """The angles of a step's tokens, at positions [T]; looked up once for all layers of a table."""

    @abstractmethod
    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: Rotation | None,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normalises (where a norm is given) and rotates (where angles are given) queries and keys, and puts
        keys and values into their slots. A pair of channels (a, b) becomes (a cos - b sin, b cos + a sin).

        Args:
            qkv: [T, (H + 2 * HK) * D]. May be overwritten.

        Returns:
            The queries, [T, H, D].
        """

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Causal attention of query [T, num_heads, head_dim] over each request's own context.

        The step's keys and values are in the cache already. Query heads share key-value heads in groups of
        consecutive heads. Never lets the content of a slot outside a request's context into its result, NaN
        included.

        Returns:
            [T, num_heads, head_dim].
        """
