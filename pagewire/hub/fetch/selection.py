"""Which of a repository's files are needed to serve its model: no code, and no weights twice."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path, PurePosixPath

from pagewire.base.errors import ConfigError
from pagewire.hub.gguf.parts import missing_parts, part_names
from pagewire.hub.model_files import SAFETENSORS, WEIGHT_FILES, WeightFiles, indexed_files

# Of the top folder.
_SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
# Of others: templates beside the default one, and what modules.json of an embedding model names.
_SMALL_BELOW = ("additional_chat_templates/*.jinja", "[0-9]_*/config.json")
_NOT_SMALL = ("*.index.json", "consolidated*", "adapter_*")
# Parts of a GGUF model that are no text model of their own: an image encoder, calibration data.
_GGUF_EXTRAS = ("*mmproj*", "*imatrix*")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SHOWN = 12


def small_files(names: Collection[str]) -> list[str]:
    """Configuration, tokenizer, templates, and the index of the weights."""
    weights = _weights(names)
    return [
        name
        for name in names
        if (weights is not None and name == weights.index)
        or ("/" not in name and _matches(name, _SMALL) and not _matches(name, _NOT_SMALL))
        or (name.count("/") == 1 and _matches(name, _SMALL_BELOW))
    ]


def weight_files(model: str, names: Collection[str], directory: Path) -> list[str]:
    """The files of weights in the preferred format, each tensor once.

    Args:
        names: the repository's files.
        directory: has its small files already.

    Raises:
        ConfigError: it has no weights that are read, or its index names files that it does not have.
    """
    weights = _weights(names)
    if weights is None:
        raise _no_weights(model, names)
    if weights.index not in names:
        return [weights.single]
    listed = indexed_files(directory / weights.index)
    missing = [name for name in listed if name not in names]
    if missing:
        raise ConfigError(f"{model}: {weights.index} names {missing[0]!r}, which is not in the repository")
    return listed


def has_weights(names: Collection[str]) -> bool:
    """Whether there are weights in Hugging Face layout."""
    return _weights(names) is not None


def has_safetensors(names: Collection[str]) -> bool:
    """Whether its weights are safetensors."""
    return _weights(names) is SAFETENSORS


def gguf_files(model: str, names: Collection[str], wanted: str | None) -> list[str]:
    """The GGUF file that is meant, or all parts of the model that it is one of, in order.

    Args:
        wanted: a file's path in the repository, its name, or its quantization (in any case); None for the
            only one.

    Raises:
        ConfigError: there is none, there are several, or the repository lacks a part.
    """
    every = sorted(name for name in names if name.lower().endswith(".gguf"))
    models = [name for name in every if not _matches(name.lower(), _GGUF_EXTRAS)]
    if wanted is None:
        found = models
    elif wanted.lower().endswith(".gguf"):
        found = [name for name in every if name == wanted] or [
            name for name in every if PurePosixPath(name).name == wanted
        ]
    else:
        found = [name for name in models if wanted.lower() in _quantizations(name)]
    firsts = _first_parts(found)
    if len(firsts) == 1:
        parts = part_names(firsts[0])
        missing = [name for name in parts if name not in names]
        if missing:
            raise missing_parts(f"{model}: {found[0]}", missing, len(parts))
        return parts
    if not every:
        raise _no_weights(model, names) if wanted is None else ConfigError(f"{model}: has no .gguf files")
    problem = "has several .gguf files" if wanted is None or firsts else f"has no .gguf file {wanted!r}"
    choices = firsts or _first_parts(models) or every
    shown = ", ".join(choices[:_SHOWN]) + (", ..." if len(choices) > _SHOWN else "")
    raise ConfigError(f"{model}: {problem}; name one as {model}:Q4_K_M or with --file, of: {shown}")


def _weights(names: Collection[str]) -> WeightFiles | None:
    """The preferred one of the formats that there are."""
    found = (files for files in WEIGHT_FILES if files.index in names or files.single in names)
    return next(found, None)


def _quantizations(name: str) -> set[str]:
    """The words of a file's name, and its folder's: "q4_k_m" of "model-Q4_K_M.gguf" or
    "Q4_K_M/model.gguf"."""
    path = PurePosixPath(name.lower())
    stem = _PART.sub("", path.stem)  # of the model, whichever part of it this is
    words = re.split(r"[-.]", stem)
    # "UD-Q4_K_XL", "i1-Q4_K_M": quantizations whose names have a dash in them.
    pairs = {"-".join(pair) for pair in pairwise(words)}
    return {*words[1:], *pairs, *path.parent.parts}


def _first_parts(names: Collection[str]) -> list[str]:
    """One name for each model: its file's, or its first part's."""
    return sorted({part_names(name)[0] for name in names})


def _no_weights(model: str, names: Collection[str]) -> ConfigError:
    looked_for = ", ".join(files.single for files in WEIGHT_FILES)
    if any(name.startswith("adapter_model.") for name in names):
        hint = "; it is an adapter, which is served with its base model"
    else:
        others = sorted(
            name for name in names if not _matches(name, ("*.md", "*.txt", "*.json", ".*", "*.py"))
        )
        hint = f"; it has {', '.join(others[:5])}" if others else ""
    return ConfigError(
        f"{model}: has no weights that are read ({looked_for}, their shards, or .gguf files){hint}"
    )


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
