"""Model shapes that come with the package: a config.json without weights, to be run with random ones."""

from __future__ import annotations

from pathlib import Path

_DIRECTORY = Path(__file__).parent
SHAPES = ("llama8b", "qwen06b", "mixtral8x7b", "qwen3-30b-a3b")


def shape_directory(model: str) -> Path | None:
    """The directory of a bundled shape; None if `model` is anything else, such as a directory's own name."""
    return _DIRECTORY / model if model in SHAPES and not Path(model).is_dir() else None
