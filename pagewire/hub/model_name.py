"""What requests call a model that was given no name of its own."""

from __future__ import annotations

from pathlib import Path


def default_model_name(model: str) -> str:
    """A file's or directory's own name without folders and suffix, or else the alias or Hugging Face id."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else model
