"""Checkpoints of a decoder alone, as embedding models are saved: names without "model.", often no output
projection."""

from __future__ import annotations

from dataclasses import replace

from engine.loader.checkpoint import Checkpoint
from engine.models.base import ModelContext
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.models.families import checkpoint_names

_DECODER = "model."
_EMBEDDING = "model.embed_tokens"


def names_in(checkpoint: Checkpoint, config: ModelConfig) -> CheckpointNames:
    """What this checkpoint calls modules: as its family does, or without the decoder's own name.

    An output projection that a model with another head has kept, which happens where it was trained from a
    model that generates, is ignored, as transformers does.
    """
    names = checkpoint_names(config.architecture)
    bare = replace(names, left_out=_DECODER)
    if _holds(checkpoint, bare, _EMBEDDING) and not _holds(checkpoint, names, _EMBEDDING):
        names = bare
    if not config.has_lm_head:
        names = replace(names, ignored=(*names.ignored, f"{names.module('lm_head')}.weight"))
    return names


def drop_missing_head(context: ModelContext, checkpoint: Checkpoint) -> ModelContext:
    """The context for a model with this checkpoint, found out before anything is allocated: one without an
    output projection if the decoder was saved alone, under the name of an architecture that has one, as with
    Qwen3-Embedding."""
    config = context.config
    names = names_in(checkpoint, config)
    if not config.has_lm_head or config.tie_word_embeddings or names.left_out != _DECODER:
        return context
    if _holds(checkpoint, names, "lm_head"):
        return context
    return replace(context, config=replace(config, has_lm_head=False))


def _holds(checkpoint: Checkpoint, names: CheckpointNames, module: str) -> bool:
    return checkpoint.find(f"{names.module(module)}.weight") is not None
