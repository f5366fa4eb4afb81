"""The directory that an export writes, of which a run before this one may have written a part.

    model-00001-of-00031.safetensors ...    one file for each decoder layer, the last for all that is outside
    model.safetensors.index.json, config.json, tokenizer files     at the end
    .export/                                until the end: what the export is of, activations between layers

A file that is there is whole. A layer's file is written after the activations behind the layer, so that where
the first file is missing, what the layer needs is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.loader.stream import stored_tensors
from pagewire.base.errors import ConfigError
from pagewire.export.config import ExportConfig
from pagewire.export.safetensors_file import Entry, write_file
from pagewire.hub.model_files import SAFETENSORS

_STATE = ".export"
# What a model directory has beside its weights and is copied as it is.
_COPIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("generation_config.json", "chat_template*", "*.model", "*.py", "LICENSE*", "NOTICE*"),
)
_NOT_STATE = ("out", "device")
"""What may differ when an export is gone on with."""


@dataclass(slots=True)
class OutputDirectory:
    """See the module.

    Attributes:
        path: the directory.
        num_files: of weights.
    """

    path: Path
    num_files: int

    @classmethod
    def open(cls, config: ExportConfig, source: Path, num_files: int) -> OutputDirectory:
        """Makes the directory, or finds what a run before this one left in it.

        Raises:
            ConfigError: it has files of something else, or of an export of another model or with other
                settings.
        """
        output = cls(config.out, num_files)
        state = _state(config, source)
        if config.out.exists() and not config.out.is_dir():
            raise ConfigError(f"{config.out} is no directory; name a new one", param="out")
        state_file = output._own("state.json")
        if state_file.is_file():
            if json.loads(state_file.read_text(encoding="utf-8")) != state:
                raise ConfigError(
                    f"{config.out} has an unfinished export of another model or with other settings; give "
                    "the same ones to go on with it, or name another directory",
                    param="out",
                )
            return output
        if config.out.is_dir() and any(config.out.iterdir()):
            raise ConfigError(f"{config.out} is not empty; name a new directory", param="out")
        state_file.parent.mkdir(parents=True)
        _write_text(state_file, json.dumps(state))
        return output

    def file(self, index: int) -> Path:
        """A file of weights: that of a layer, or the last one."""
        return self.path / f"model-{index + 1:05d}-of-{self.num_files:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a file of weights is there."""
        return self.file(index).is_file()

    def write(self, index: int, entries: Sequence[Entry]) -> None:
        """Writes a file of weights."""
        write_file(self.file(index), entries)

    def hidden(self, index: int) -> npt.NDArray[np.float32] | None:
        """The activations before a layer, [T, hidden], mapped from their file; None if they are not there."""
        path = self._own(f"hidden-{index}.npy")
        return np.load(path, mmap_mode="r") if path.is_file() else None

    def new_hidden(self, index: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Where the activations before a layer can be written; `keep_hidden` keeps them."""
        path = self._own(f"hidden-{index}.partial")
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def keep_hidden(self, index: int) -> None:
        """Says that the activations before a layer are all written."""
        self._own(f"hidden-{index}.partial").rename(self._own(f"hidden-{index}.npy"))

    def drop_hidden(self, index: int) -> None:
        """Removes the activations before a layer."""
        self._own(f"hidden-{index}.npy").unlink(missing_ok=True)

    def finish(self, source: Path, config: Mapping[str, Any]) -> int:
        """Writes what there is beside the weights. Returns the bytes of these."""
        weight_map, total = {}, 0
        for index in range(self.num_files):
            for stored in stored_tensors(self.file(index)):
                weight_map[stored.name] = self.file(index).name
                total += stored.num_bytes
        index_of_files = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(self.path / SAFETENSORS.index, json.dumps(index_of_files, indent=2) + "\n")
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self.path / file.name)
        _write_text(self.path / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self._own("state.json").parent)
        return total

    def _own(self, name: str) -> Path:
        return self.path / _STATE / name


def _state(config: ExportConfig, source: Path) -> dict[str, Any]:
    """What an export is of, to be compared."""
    settings = {name: str(value) for name, value in asdict(config).items() if name not in _NOT_STATE}
    files = sorted(path for path in source.iterdir() if path.is_file())
    sizes = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    if config.dataset is not None:
        sizes.append(hashlib.sha256(config.dataset.read_bytes()).hexdigest())
    return {"settings": settings, "source": hashlib.sha256("\n".join(sizes).encode()).hexdigest()}


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
