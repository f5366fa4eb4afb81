"""CUDA graphs of steps, by shape: a step is padded to the next captured shape and replayed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from engine.cuda.step_shape import StepShape


class GraphSize(NamedTuple):
    """The size of a graph: decodes, chunks, tokens of all chunks, whether the decodes share a prefix, and
    whether requests have adapters."""

    num_decodes: int
    num_chunks: int
    num_chunk_tokens: int
    shares_prefix: bool
    has_adapters: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens

    @property
    def is_plain_decode(self) -> bool:
        return not self.num_chunks and not self.shares_prefix


class StepGraphs:
    """Graphs that share one memory pool. The largest is captured first, so the others fit into its memory.

    Args:
        compute: launches a step of a given shape, reading and writing fixed memory only; returns the logits.
        device: the GPU.
    """

    def __init__(self, compute: Callable[[StepShape], torch.Tensor], device: torch.device) -> None:
        self._compute = compute
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        # By whether the decodes share a prefix, and whether requests have adapters.
        self._decodes: dict[tuple[bool, bool], list[StepShape]] = {}
        self._mixed: dict[bool, list[StepShape]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, shapes: Sequence[StepShape]) -> None:
        """Captures a graph for every shape. Waits for the device's current work."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for shape in sorted(shapes, key=_size, reverse=True):
            graph = torch.cuda.CUDAGraph()
            # Relaxed, because kernels that were never launched are loaded, or even compiled, during capture.
            # That does not affect the graph, and launching each step first would take twice as long again.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                logits = self._compute(shape)
            self._graphs[shape] = graph, logits
        shapes = sorted(self._graphs, key=_size)
        self._decodes, self._mixed = {}, {}
        for shape in shapes:
            has_adapters = shape.num_adapter_tiles > 0
            if shape.num_chunks:
                self._mixed.setdefault(has_adapters, []).append(shape)
            else:
                self._decodes.setdefault((shape.shares_prefix, has_adapters), []).append(shape)

    def forget(self) -> None:
        """Drops all graphs, as when they launch what belongs to a group of ranks that is no more."""
        self._graphs.clear()
        self._decodes, self._mixed = {}, {}

    def find(
        self,
        num_decodes: int,
        num_chunks: int,
        num_chunk_tokens: int,
        *,
        shares_prefix: bool,
        has_adapters: bool = False,
    ) -> StepShape | None:
        """The smallest captured shape with room for this many of each; None if there is none."""
        if not num_chunks:
            decodes = self._decodes.get((shares_prefix, has_adapters), [])
            at = bisect_left(decodes, num_decodes, key=lambda shape: shape.num_decodes)
            return decodes[at] if at < len(decodes) else None
        if shares_prefix:
            return None
        for shape in self._mixed.get(has_adapters, []):
            if (
                num_decodes <= shape.num_decodes
                and num_chunks <= shape.num_chunks
                and num_chunk_tokens <= shape.num_chunk_tokens
            ):
                return shape
        return None

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Launches a captured shape. Returns its logits, valid until the next replay of any graph."""
        graph, logits = self._graphs[shape]
        graph.replay()
        return logits


def _size(shape: StepShape) -> tuple[int, int]:
    return shape.num_tokens, shape.num_slots


# As many requests are captured with every number of drafts.
_DRAFTED = (1, 2, 4, 8, 16, 32)


def decode_graph_sizes(max_num_seqs: int, max_drafts: int = 0) -> list[int]:
    """Numbers of slots for graphs of decode steps: closer together where padding would cost most. With
    drafts, requests have a slot more for each of theirs."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs + 1, 32)]
    with_drafts = {
        count * (1 + drafts)
        for count in _DRAFTED
        if count <= max_num_seqs
        for drafts in range(1, max_drafts + 1)
    }
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs} | with_drafts)


def mixed_graph_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[GraphSize]:
    """Sizes of steps that mix decodes and prompts, as occur when requests arrive a few at a time."""
    decodes = [size for size in (16, 64, 128, 192, 256) if size < max_num_seqs] + [max_num_seqs]
    tokens = [size for size in (128, 256, 384, 512, 768, 1024) if size <= max_num_batched_tokens]
    return [
        GraphSize(d, min(max_num_seqs, max(4, p // 64)), p, False)
        for d in sorted(set(decodes))
        for p in tokens
    ]
