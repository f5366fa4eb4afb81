"""Captured CUDA graphs of steps, by shape: a step is padded to the next captured shape and replayed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from engine.cuda.step_shape import StepShape

logger = logging.getLogger(__name__)


class StepGraphs:
    """Graphs that share one memory pool, captured largest first so that the others fit in its memory.

    Args:
        compute: launches everything a step of a shape does, reading and writing fixed memory only; returns
            the logits.
        pad: makes the fixed memory that of a step of the shape with padding alone.
    """

    def __init__(
        self,
        compute: Callable[[StepShape], torch.Tensor],
        pad: Callable[[StepShape], None],
        device: torch.device,
    ) -> None:
        self._compute = compute
        self._pad = pad
        self._device = device
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._by_size: list[StepShape] = []

    def capture(self, shapes: Sequence[StepShape]) -> None:
        """Captures a graph for every shape."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for shape in sorted(shapes, key=_size, reverse=True):
            self._pad(shape)
            # Once without capturing, since compiling and cuBLAS's set-up cannot be captured.
            with torch.cuda.stream(stream):
                self._compute(shape)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = self._compute(shape)
            self._graphs[shape] = graph, logits
        torch.cuda.synchronize(self._device)
        self._by_size = sorted(self._graphs, key=_size)
        logger.info("captured %d graphs in %.1f s", len(shapes), time.monotonic() - started)

    def find(self, num_decodes: int, num_chunks: int, num_chunk_tokens: int) -> StepShape | None:
        """The smallest captured shape that holds so many of each; None if there is none."""
        for shape in self._by_size:
            if (
                num_decodes <= shape.num_decodes
                and num_chunks <= shape.num_chunks
                and num_chunk_tokens <= shape.num_chunk_tokens
            ):
                return shape
        return None

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Launches a captured shape; its logits, valid until the next replay of any."""
        graph, logits = self._graphs[shape]
        graph.replay()
        return logits


def _size(shape: StepShape) -> tuple[int, int]:
    return shape.num_tokens, shape.num_slots


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a decode graph: close together where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs + 1, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
