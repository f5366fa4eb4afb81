"""What requests call a model that was given no name of its own."""

from __future__ import annotations

from pathlib import Path

from pagewire.hub.names.reference import ModelReference


def default_model_name(model: str) -> str:
    """A file's or directory's own name without folders and suffix, or else the alias, or owner/name of what
    is on a hub."""
    path = Path(model).expanduser()
    if path.exists():
        return path.stem if path.suffix == ".gguf" else path.resolve().name
    reference = ModelReference.parse(model)
    if reference is not None:
        return reference.name
    return path.stem if path.suffix == ".gguf" else model
