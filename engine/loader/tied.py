"""Whether a model that ties its output projection to its embedding has a projection of its own after all."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from engine.loader.checkpoint import Checkpoint, readable
from engine.loader.stream import StoredTensor, read_exactly
from engine.models.base import ModelContext
from engine.models.families import checkpoint_names

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 4 * 1024**2


def untie_own_head(context: ModelContext, checkpoint: Checkpoint, dtype: torch.dtype) -> ModelContext:
    """The context for a model with this checkpoint, found out before anything is allocated.

    Some fine-tunes train the output projection apart and leave `tie_word_embeddings: true` behind. Where the
    checkpoint holds both matrices and they differ in the model's dtype, each is used, as transformers does.
    """
    if not context.config.tie_word_embeddings:
        return context
    names = checkpoint_names(context.config.architecture)
    head_name = f"{names.module('lm_head')}.weight"
    embedding_name = f"{names.module('model.embed_tokens')}.weight"
    head, embedding = checkpoint.find(head_name), checkpoint.find(embedding_name)
    if head is None or embedding is None or have_same_values(head, embedding, dtype):
        return context
    logger.warning(
        "%s: tie_word_embeddings is true, but %s differs from %s; both are used",
        checkpoint.directory,
        head_name,
        embedding_name,
    )
    return replace(context, config=replace(context.config, tie_word_embeddings=False))


def have_same_values(first: StoredTensor, second: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two tensors in files are equal once they are converted to the dtype. Reads no further than to
    the first difference, and little at a time.

    Raises:
        ConfigError: a file cannot be read.
    """
    if first.shape != second.shape or first.strides != second.strides:
        return False
    if (first.path, first.begin, first.dtype) == (second.path, second.begin, second.dtype):
        return True  # torch.save keeps tied tensors once
    reading = _Chunks(first), _Chunks(second)
    for start in range(0, first.num_bytes // first.dtype.itemsize, CHUNK_ELEMENTS):
        ours, theirs = (chunks.read(start) for chunks in reading)
        # Equal bytes are compared several times faster than numbers are converted.
        same_bytes = first.dtype == second.dtype and torch.equal(
            ours.view(torch.uint8), theirs.view(torch.uint8)
        )
        if not same_bytes and not torch.equal(ours.to(dtype), theirs.to(dtype)):
            return False
    return True


class _Chunks:
    """Reads a tensor piece by piece into one buffer."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored
        self._bytes = torch.empty(CHUNK_ELEMENTS * stored.dtype.itemsize, dtype=torch.uint8)

    def read(self, start: int) -> torch.Tensor:
        """Up to CHUNK_ELEMENTS from the element `start` on; the next call overwrites them."""
        stored, itemsize = self._stored, self._stored.dtype.itemsize
        at = start * itemsize
        chunk = self._bytes[: stored.num_bytes - at]
        with readable(stored.path), stored.path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), memoryview(chunk.numpy()), stored, at)  # type: ignore[arg-type]
        return chunk.view(stored.dtype)
