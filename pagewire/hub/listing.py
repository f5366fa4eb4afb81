"""What is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagewire.base.cache_home import cache_home
from pagewire.hub.names.aliases import ALIASES
from pagewire.hub.names.reference import HUB_TITLES, HUGGINGFACE, MODELSCOPE


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model in the cache.

    Attributes:
        name: what to type for MODEL to get it.
        path: where it lies.
        size: bytes on disk.
        source: where it came from, for people.
    """

    name: str
    path: Path
    size: int
    source: str


def list_models() -> list[ModelEntry]:
    """What is in the cache, by name."""
    home = cache_home()
    entries = [
        _entry(name, home / "gguf" / name, ALIASES[name].source if name in ALIASES else "an earlier version")
        for name in _subdirectories(home / "gguf")
    ]
    converted = [home / "converted" / name for name in _subdirectories(home / "converted")]
    entries += [_entry(str(path), path, "converted from GGUF") for path in converted]
    for name in _subdirectories(home / "huggingface"):
        if name.startswith("models--"):
            model = name.removeprefix("models--").replace("--", "/", 1)
            entries.append(_entry(model, home / "huggingface" / name, HUB_TITLES[HUGGINGFACE]))
    for name in _subdirectories(home / "modelscope" / "models"):
        model = f"{MODELSCOPE}:{name.replace('--', '/', 1)}"
        entries.append(_entry(model, home / "modelscope" / "models" / name, HUB_TITLES[MODELSCOPE]))
    return sorted(entries, key=lambda entry: entry.name)


def _subdirectories(directory: Path) -> list[str]:
    """Names of the visible directories; what is still being written starts with a dot."""
    if not directory.is_dir():
        return []
    return [child.name for child in directory.iterdir() if child.is_dir() and not child.name.startswith(".")]


def _entry(name: str, path: Path, source: str) -> ModelEntry:
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    partial = any(file.suffix == ".incomplete" for file in files)
    return ModelEntry(
        name=name,
        path=path,
        size=sum(file.stat().st_size for file in files),
        source=f"{source}, not all of it: 'pagewire pull {name}' goes on" if partial else source,
    )
