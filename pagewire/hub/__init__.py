"""Models by name: fetches, converts and caches them, so that every other module sees one layout.

`resolve_model` turns whatever a user types for MODEL into a directory in Hugging Face layout. The cache
is `$PAGEWIRE_HOME` (default `~/.cache/pagewire`):

    gguf/<alias>/<file>.gguf         fetched files, checksum verified
    converted/<name>-<identity>/     GGUF files converted to Hugging Face layout
    huggingface/                     models of the Hugging Face Hub, in huggingface_hub's own layout
    modelscope/                      models of ModelScope, in the layout of modelscope's library
    locks/                           one empty file per thing being written
"""

from __future__ import annotations

from pagewire.hub.listing import ModelEntry, list_models
from pagewire.hub.names.aliases import ALIASES, DEFAULT_MODEL, ModelAlias
from pagewire.hub.names.reference import HUBS, located
from pagewire.hub.resolve import pull, resolve_checkpoint, resolve_model

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "HUBS",
    "ModelAlias",
    "ModelEntry",
    "list_models",
    "located",
    "pull",
    "resolve_checkpoint",
    "resolve_model",
]
