"""Converts a GGUF file to a directory in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire.hub.cache import require_free_space
from pagewire.hub.gguf_config import generation_config, model_config, require_supported_architecture
from pagewire.hub.gguf_reader import read_gguf
from pagewire.hub.gguf_tokenizer import tokens, write_tokenizer
from pagewire.hub.gguf_weights import weights_size, write_weights
from pagewire.hub.progress import report_progress

_TOKENIZER_ROOM = 64 * 1024 * 1024


def convert_gguf(
    path: Path, directory: Path, sampling: Mapping[str, float] | None = None, *, progress: bool
) -> None:
    """Fills `directory` with config, tokenizer and float32 weights. The GGUF file is not changed.

    Args:
        sampling: default sampling parameters for generation_config.json, which GGUF has no place for.

    Raises:
        ConfigError: the file is corrupt, of an architecture, tokenizer or tensor type that cannot be
            converted, or the disk is too full.
        OSError: the directory cannot be written.
    """
    gguf = read_gguf(path)
    require_supported_architecture(gguf)
    vocab_size = len(tokens(gguf))
    config = model_config(gguf, vocab_size)
    size = weights_size(gguf)
    require_free_space(directory, size + _TOKENIZER_ROOM, f"converting {path.name}")
    _write_json(directory / "config.json", config)
    defaults = {"do_sample": True, **sampling} if sampling else {}
    _write_json(directory / "generation_config.json", {**generation_config(gguf, vocab_size), **defaults})
    write_tokenizer(gguf, directory, config["max_position_embeddings"])
    with report_progress(f"Converting {path.name}", size, enabled=progress) as advance:
        write_weights(gguf, config, directory / "model.safetensors", advance)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
