"""What a directory in Hugging Face layout holds: one safetensors file, or shards under an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from engine.loader.stream import StoredTensor, stored_tensors
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import INDEX_FILE, pickle_hint, read_weight_map, require_weight_files

SINGLE_FILE = "model.safetensors"

# In all files together; the largest published checkpoints have hundreds of thousands.
MAX_TENSORS = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint. Nothing but the files' headers has been read.

    Attributes:
        files: what is to be read from each file, in the order of its bytes.
    """

    directory: Path
    files: Mapping[Path, Sequence[StoredTensor]]

    def find(self, name: str) -> StoredTensor | None:
        """A tensor by its name; None if there is none."""
        stored = (tensor for tensors in self.files.values() for tensor in tensors if tensor.name == name)
        return next(stored, None)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the index and the files' headers. Where a tensor is in the file that the index gives it to, its
    copies in other files are left out: repacked checkpoints keep stale ones.

    Raises:
        ConfigError: there is no checkpoint, the index is malformed, or a file is missing, damaged or lies
            elsewhere.
    """
    index = directory / INDEX_FILE
    weight_map: Mapping[str, str] = {}
    if index.is_file():
        weight_map = read_weight_map(index)
        paths = require_weight_files(directory, sorted(set(weight_map.values())), listed_in=index)
    elif (directory / SINGLE_FILE).is_file():
        paths = require_weight_files(directory, [SINGLE_FILE])
    else:
        raise ConfigError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{pickle_hint(directory)}")
    files: dict[Path, list[StoredTensor]] = {}
    for path in paths:
        with readable(path):
            files[path] = stored_tensors(path)
        if sum(map(len, files.values())) > MAX_TENSORS:
            raise ConfigError(f"{directory}: the checkpoint has more than {MAX_TENSORS} tensors")
    return Checkpoint(directory, _without_stale_copies(files, weight_map))


def _without_stale_copies(
    files: Mapping[Path, Sequence[StoredTensor]], weight_map: Mapping[str, str]
) -> dict[Path, list[StoredTensor]]:
    in_place = {
        stored.name
        for path, tensors in files.items()
        for stored in tensors
        if weight_map.get(stored.name) == path.name
    }
    return {
        path: [
            stored
            for stored in tensors
            if stored.name not in in_place or weight_map[stored.name] == path.name
        ]
        for path, tensors in files.items()
    }


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around reading a file: says which could not be read."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        hint = "; it is cut short, or longer than it should be" if "not fully covered" in str(error) else ""
        raise ConfigError(f"{path} cannot be read as safetensors: {error}{hint}") from error
