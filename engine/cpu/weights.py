"""What a model's weights take on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engine.cpu.kernels.library import PackedMatrix
from engine.cpu.native_layouts import NativeGroups


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Number format -> bytes of the weights in it, the most first. What several layers share counts once.
    Formats are those of files, "INT4" and "INT8" of integers in groups, dtypes, and layouts' names."""
    held: dict[int, tuple[str, int]] = {}
    for module in model.modules():
        for part in _parts(module):
            held[id(part)] = _size(part)
    total: dict[str, int] = {}
    for name, count in held.values():
        total[name] = total.get(name, 0) + count
    return dict(sorted(total.items(), key=lambda each: -each[1]))


def _parts(module: nn.Module) -> Iterator[Any]:
    """The tensors, packed matrices and layouts that a module itself holds."""
    yield from module.parameters(recurse=False)
    yield from getattr(module, "layouts", ())
    for name in ("packed", "packed_weight"):
        found = getattr(module, name, ())
        yield from found if isinstance(found, list | tuple) else (found,)


def _size(part: Any) -> tuple[str, int]:
    if isinstance(part, NativeGroups):
        part = part.packed
    if isinstance(part, PackedMatrix):
        return part.kind.name, part.panels.nbytes
    if isinstance(part, torch.Tensor):
        return str(part.dtype).removeprefix("torch."), part.numel() * part.element_size()
    return type(part).__name__, part.num_bytes
