"""Reads an adapter's directory: PEFT's layout, and ms-swift's older one.

The files come from anybody. Nothing in them is run (see engine/loader/torch_file.py for those of torch.save),
every tensor is checked, and each error says which file and which tensor.

ms-swift's layout differs from PEFT's in three ways: the adapter lies in a folder of its own name below the
directory ("default"), the adapter's name is part of the tensors' names ("lora_A.default.weight"), and they
lack the beginning "base_model.model.".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.loader.checkpoint import MAX_TENSORS, read_header, readable
from engine.loader.stream import StoredTensor
from engine.loader.weights import mapped
from engine.lora.adapter import Adapter, LoraMatrix
from engine.lora.config import AdapterConfig
from engine.platform.device import available_memory
from pagewire.base.errors import ConfigError
from pagewire.hub.adapters import adapter_directory, weights_file

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<matrix>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)??(?:\.weight)?"
    r")"
)
# Names of copies of the base's own weights, which PEFT saves beside an adapter of embeddings.
_BASE_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.(?P<kind>weight|bias)")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(slots=True)
class _Parts:
    """The tensors of one module."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    b_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


@dataclass(slots=True)
class _Found:
    """All tensors of an adapter's file, sorted."""

    matrices: dict[str, _Parts] = field(default_factory=dict)
    embeddings: dict[str, _Parts] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)


def read_adapter(directory: Path, *, max_rank: int | None = None) -> Adapter:
    """Reads an adapter into host memory.

    Args:
        directory: has adapter_config.json, or one folder that has.
        max_rank: a larger rank is refused.

    Raises:
        ConfigError: a file is missing, damaged or no adapter's, a tensor is not what its name says, a number
            is not finite, or a setting is not supported.
    """
    directory = adapter_directory(directory)
    config = AdapterConfig.read(directory)
    path = weights_file(directory)
    with readable(path):
        stored = read_header(path)
    _require_room(stored, path)
    found = _Found()
    with readable(path), mapped(path) as tensor_of:
        for each in stored:
            _sort(found, each.name, _checked(each, tensor_of(each), path), f"{path}: {each.name}")
    adapter = Adapter(
        config=config,
        matrices=dict(_pairs(found.matrices, config, max_rank, path)),
        embeddings=dict(_pairs(found.embeddings, config, max_rank, path)),
        biases=found.biases,
        saved=found.saved,
        num_bytes=sum(each.num_bytes for each in stored),
    )
    if not (adapter.matrices or adapter.embeddings or adapter.saved):
        raise ConfigError(f"{path} has no tensor of an adapter (such as ...q_proj.lora_A.weight)")
    _require_targets(adapter)
    return adapter


def _require_room(stored: list[StoredTensor], path: Path) -> None:
    if len(stored) > MAX_TENSORS:
        raise ConfigError(f"{path} has more than {MAX_TENSORS} tensors")
    needed, available = sum(each.num_bytes for each in stored), available_memory()
    if 2 * needed > available:
        raise ConfigError(
            f"{path}: its tensors take {needed / 2**20:.0f} MiB, twice while they are read, and "
            f"{available / 2**20:.0f} MiB of memory are free"
        )


def _checked(stored: StoredTensor, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if stored.dtype not in _FLOATS:
        kinds = ", ".join(str(each).removeprefix("torch.") for each in _FLOATS)
        raise ConfigError(f"{path}: {stored.name} is of {stored.dtype}; an adapter's tensors are of {kinds}")
    if tensor.numel() == 0 or tensor.dim() > 2:
        raise ConfigError(
            f"{path}: {stored.name} has shape {list(tensor.shape)}; a matrix or a vector is needed"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{path}: {stored.name} has numbers that are not finite")
    return tensor.clone()


def _sort(found: _Found, name: str, tensor: torch.Tensor, where: str) -> None:
    """Puts a tensor where its name says."""
    name = name.removeprefix(_PREFIX)
    part = _PART.fullmatch(name)
    if part is None:
        _sort_whole(found, name, tensor, where)
        return
    module = part["module"]
    if part["embedding"]:
        parts, attribute = found.embeddings.setdefault(module, _Parts()), part["embedding"][-1].lower()
    else:
        parts = found.matrices.setdefault(module, _Parts())
        attribute = "magnitude" if part["magnitude"] else part["matrix"][-1].lower()
    if part["kind"] == "bias":
        if attribute == "a":
            raise ConfigError(f"{where}: lora_A has no bias")
        attribute = "b_bias"
    if getattr(parts, attribute) is not None:
        raise ConfigError(f"{where} is there twice: the file holds more than one adapter")
    setattr(parts, attribute, tensor)


def _sort_whole(found: _Found, name: str, tensor: torch.Tensor, where: str) -> None:
    if _BASE_COPY.fullmatch(name):
        return  # of a frozen layer
    whole = _SAVED.fullmatch(name)
    if whole is None:
        raise ConfigError(f"{where} is no tensor of a LoRA adapter")
    into = found.biases if whole["kind"] == "bias" else found.saved
    into[whole["module"]] = tensor


def _pairs(
    modules: Mapping[str, _Parts], config: AdapterConfig, max_rank: int | None, path: Path
) -> Iterator[tuple[str, LoraMatrix]]:
    """The modules' matrices, checked against each other and the configuration."""
    for module, parts in modules.items():
        where = f"{path}: {module}"
        if parts.a is None or parts.b is None:
            missing = "lora_A" if parts.a is None else "lora_B"
            raise ConfigError(f"{where} has no {missing}")
        rank, wanted = parts.a.shape[0], config.rank_of(module)
        if parts.a.dim() != 2 or parts.b.dim() != 2 or parts.b.shape[1] != rank:
            shapes = f"{list(parts.a.shape)} and {list(parts.b.shape)}"
            raise ConfigError(
                f"{where}: lora_A and lora_B have the shapes {shapes}; [r, in] and [out, r] are needed"
            )
        if rank != wanted:
            raise ConfigError(f"{where} has rank {rank}; {config.source} says {wanted}")
        if max_rank is not None and rank > max_rank:
            raise ConfigError(f"{where} has rank {rank}; max_lora_rank allows {max_rank}")
        if config.use_dora != (parts.magnitude is not None):
            raise ConfigError(
                f"{where} has {'no' if config.use_dora else 'a'} lora_magnitude_vector; {config.source} has "
                f"use_dora {str(config.use_dora).lower()}"
            )
        scale, out_features = config.scale(module, rank), parts.b.shape[0]
        vectors = []
        for vector in (parts.magnitude, parts.b_bias):
            vector = None if vector is None else vector.flatten()
            if vector is not None and len(vector) != out_features:
                raise ConfigError(f"{where} has a vector of {len(vector)} numbers for {out_features} outputs")
            vectors.append(vector)
        magnitude, bias = vectors
        if bias is not None:
            bias = bias.float() * scale
        yield module, LoraMatrix(parts.a, parts.b, scale, magnitude, bias)


def _require_targets(adapter: Adapter) -> None:
    """What the configuration's list of targets and the file's tensors must have in common: a name of the list
    that no tensor has is one that the training had, and that is missing here."""
    targets = adapter.config.target_modules
    if isinstance(targets, str):
        return  # a regular expression, or "all-linear": over modules of which only the base knows
    modules = [*adapter.matrices, *adapter.embeddings]
    missing = [
        name for name in targets if not any(each == name or each.endswith(f".{name}") for each in modules)
    ]
    if missing and len(missing) == len(targets):
        raise ConfigError(
            f"{adapter.config.source}: target_modules has {', '.join(map(repr, missing[:8]))}, of which the "
            f"tensors have none; they are of {', '.join(map(repr, modules[:3]))} ..."
        )
    needed = {name.rpartition(".")[2] for name in adapter.config.modules_to_save}
    there = {name.rpartition(".")[2] for name in adapter.saved}
    if needed - there:
        raise ConfigError(
            f"{adapter.config.source}: modules_to_save has {', '.join(sorted(needed - there))}, of which "
            "there "
            "are no weights"
        )
