"""What a directory in Hugging Face layout holds: one file of weights, or shards under an index.

The files are safetensors or else those of torch.save, such as pytorch_model.bin; safetensors are preferred.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from engine.loader import torch_file
from engine.loader.stream import StoredTensor, stored_tensors
from engine.loader.torch_file import TorchFileError
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import (
    WEIGHT_FILES,
    WeightFiles,
    find_weight_files,
    other_weights_hint,
    read_weight_map,
    require_weight_files,
)

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
    found = find_weight_files(directory)
    if found is None:
        looked_for = " nor ".join(f"{each.single} nor {each.index}" for each in WEIGHT_FILES)
        raise ConfigError(f"{directory} holds neither {looked_for}{other_weights_hint(directory)}")
    weight_map, paths = _listed_files(directory, found)
    files: dict[Path, list[StoredTensor]] = {}
    for path in paths:
        with readable(path):
            files[path] = read_header(path)
        if sum(map(len, files.values())) > MAX_TENSORS:
            raise ConfigError(f"{directory}: the checkpoint has more than {MAX_TENSORS} tensors")
    return Checkpoint(directory, _without_stale_copies(files, weight_map))


def _listed_files(directory: Path, found: WeightFiles) -> tuple[Mapping[str, str], list[Path]]:
    """The index, empty where there is none, and the files."""
    index = directory / found.index
    if not index.is_file():
        return {}, require_weight_files(directory, [found.single])
    weight_map = read_weight_map(index)
    return weight_map, require_weight_files(directory, sorted(set(weight_map.values())), listed_in=index)


def is_safetensors(path: Path) -> bool:
    """Whether a file of weights is of safetensors, and not of torch.save."""
    return path.suffix == ".safetensors"


def read_header(path: Path) -> list[StoredTensor]:
    """A file's tensors in the order of their bytes; to be called inside `readable`."""
    return stored_tensors(path) if is_safetensors(path) else torch_file.stored_tensors(path)


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
    except (SafetensorError, TorchFileError, OSError) as error:
        kind = "safetensors" if is_safetensors(path) else "a PyTorch checkpoint"
        hint = "; it is cut short, or longer than it should be" if "not fully covered" in str(error) else ""
        raise ConfigError(f"{path} cannot be read as {kind}: {error}{hint}") from error
