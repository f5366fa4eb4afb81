"""Reading the small files of a model directory, which may be damaged or made to do harm.

Time and memory are bounded whatever a file holds, and every error names it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError

MAX_CONFIG_BYTES = 16 * 1024**2
MAX_INDEX_BYTES = 128 * 1024**2
"""An index has a line for each tensor; the largest published ones have hundreds of thousands."""
MAX_TOKENIZER_BYTES = 128 * 1024**2
"""The largest published ones have a quarter of this."""
MAX_TEMPLATE_BYTES = 1024**2
MAX_JSON_DEPTH = 64

OTHER_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.msgpack",
    "*.h5",
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What a format's files are called: one alone, or the index of several."""

    single: str
    index: str


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json")
PYTORCH = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_FILES = (SAFETENSORS, PYTORCH)
"""The formats of weights in a model directory, the preferred one first."""


def find_weight_files(directory: Path) -> WeightFiles | None:
    """The format whose files a model directory has; the preferred one of several, None for none."""
    for files in WEIGHT_FILES:
        if (directory / files.index).is_file() or (directory / files.single).is_file():
            return files
    return None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A regular file's content.

    Raises:
        ConfigError: it is not there, not a regular file, larger than `max_bytes`, or cannot be read.
    """
    try:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; a model directory needs it")
        if not path.is_file():  # reading a pipe or a device might never end
            raise ConfigError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is larger than {max_bytes} bytes, the most that such a file may have")
    return data


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A file that holds a JSON object in UTF-8, nested no deeper than MAX_JSON_DEPTH.

    Raises:
        ConfigError: it does not, or as `read_bytes`.
    """
    content = read_json(path, max_bytes)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}; it must hold an object")
    return content


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """A file that holds any JSON in UTF-8, nested no deeper than MAX_JSON_DEPTH.

    Raises:
        ConfigError: it does not, or as `read_bytes`.
    """
    data = read_bytes(path, max_bytes)
    try:
        content = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:  # whose own text may hold the whole file
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, (dict, list)):
        _require_shallow(path, content)
    return content


def _require_shallow(path: Path, content: Any) -> None:
    level, depth = [content], 0
    while level:
        if depth == MAX_JSON_DEPTH:
            raise _too_deep(path)
        depth += 1
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]


def _too_deep(path: Path) -> ConfigError:
    return ConfigError(f"{path} is nested too deeply; at most {MAX_JSON_DEPTH} levels are read")


def indexed_files(index: Path) -> list[str]:
    """The names of the files that a checkpoint's index lists, each once, in order. Raises as
    `read_weight_map`."""
    return sorted(set(read_weight_map(index).values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, as a checkpoint's index says.

    Raises:
        ConfigError: it is no index, or it names something other than files in its own directory.
    """
    weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} is not a checkpoint index: it has no weight_map of tensors to files")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ConfigError(f"{index} maps the tensor {tensor!r} to {name!r}; it must be a file's name")
        names.add(name)
    for name in names:
        # Of every path these are the ones that stay in the directory; "\0" ends a name for the system.
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise ConfigError(f"{index} names {name!r}; it must name files in its own directory")
    return weight_map


def require_weight_files(directory: Path, names: list[str], *, listed_in: Path | None = None) -> list[Path]:
    """The paths of a checkpoint's files, checked: regular files that lie in the model's own directory, or
    that are links into Hugging Face's cache, as in the snapshots there.

    Raises:
        ConfigError: one is missing, is something else, or is a link that leads elsewhere.
    """
    origin = directory if listed_in is None else listed_in
    paths = [directory / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not _is_file(path)]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ConfigError(f"{origin} names files that are not there: {shown}; is the checkpoint complete?")
    for path in paths:
        target = path.resolve()
        if not target.is_relative_to(directory.resolve()) and not _is_cached_blob(target):
            raise ConfigError(
                f"{path} is a link to {target}, outside the model's directory; put the file itself there"
            )
    return paths


def _is_cached_blob(path: Path) -> bool:
    """Whether it lies as models--owner--name/blobs/<hash>."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long for the file system
        return False


def other_weights_hint(directory: Path) -> str:
    """What to say of files that may be weights but have none of the names that are looked for."""
    others = sorted({path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)})
    if not others:
        return ""
    return (
        f"; its {others[0]!r} is not read: save the model with transformers' save_pretrained, or convert it"
    )


def check_small_files(directory: Path) -> None:
    """Looks at the files that every process reads when it starts, so that a wrong one is named before any
    is started.

    Raises:
        ConfigError: one is not what it must be.
    """
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if os.path.lexists(directory / name):
            read_json_object(directory / name)
    for path in sorted(directory.glob("chat_template*.jinja")):
        try:
            read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
