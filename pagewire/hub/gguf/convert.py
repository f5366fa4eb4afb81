"""Converts a GGUF file to a directory in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire.hub.cache import require_free_space
from pagewire.hub.gguf.architectures import architecture_name, find_architecture
from pagewire.hub.gguf.config import generation_config, model_config
from pagewire.hub.gguf.keys import ModelKeys, model_sizes
from pagewire.hub.gguf.layout import place_tensors
from pagewire.hub.gguf.reader import read_gguf
from pagewire.hub.gguf.tokenizer import tokens, write_tokenizer
from pagewire.hub.gguf.weights import weights_size, write_weights
from pagewire.hub.progress import report_progress

_TOKENIZER_ROOM = 64 * 1024 * 1024


def convert_gguf(
    path: Path,
    directory: Path,
    sampling: Mapping[str, float] | None = None,
    *,
    progress: bool,
    dequantized: bool = False,
) -> None:
    """Fills `directory` with config, tokenizer and weights, matrices in the file's own format where it is one
    that is computed on; experts in MXFP4 stay so. The GGUF file is not changed.

    Args:
        dequantized: whether weights become float32, as other programs read them.
        sampling: default sampling parameters for generation_config.json, which GGUF has no place for.

    Raises:
        ConfigError: the file is corrupt, of an architecture, tokenizer or tensor type that cannot be
            converted, or the disk is too full.
        OSError: the directory cannot be written.
    """
    gguf = read_gguf(path)
    keys, architecture = ModelKeys(gguf, architecture_name(gguf)), find_architecture(gguf)
    vocab_size = len(tokens(gguf))
    sizes = model_sizes(keys, vocab_size)
    config = model_config(keys, architecture, sizes)
    placements = place_tensors(gguf, architecture, sizes, config, dequantized=dequantized)
    size = weights_size(placements)
    require_free_space(directory, size + _TOKENIZER_ROOM, f"converting {path.name}")
    _write_json(directory / "config.json", config)
    defaults = {"do_sample": True, **sampling} if sampling else {}
    _write_json(directory / "generation_config.json", {**generation_config(gguf, vocab_size), **defaults})
    write_tokenizer(gguf, directory, sizes.context)
    with report_progress(f"Converting {path.name}", size, enabled=progress) as advance:
        write_weights(gguf, placements, directory / "model.safetensors", advance)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
