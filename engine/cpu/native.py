"""Layers and attention by the native kernels, for models whose activations are fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.interface import (
    AttentionMetadata,
    AttentionSpec,
    BatchLayout,
    HeadLayout,
    LayerKVCache,
    QKNorm,
    RotaryTable,
    Rotation,
)
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.kernels.build import DIRECTORY, build
from engine.cpu.kernels.library import NativeLibrary
from engine.cpu.ops import TorchLayerOps
from pagewire.base.cache_home import cache_home


def open_native() -> NativeLibrary:
    """The kernels for as many threads as torch uses, compiled first if they are not in the cache.

    Raises:
        BuildError, OSError: they cannot be.
    """
    return NativeLibrary(build(cache_home() / DIRECTORY), torch.get_num_threads())


class NativeLayerOps(TorchLayerOps):
    """See LayerOps."""

    def __init__(self, device: torch.device, native: NativeLibrary) -> None:
        super().__init__(device)
        self._native = native

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._native.rms_norm(x.contiguous(), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._native.rms_norm(residual, weight, eps, x)

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return self._native.activate_and_mul(gate_up, activation)

    def scale(self, x: torch.Tensor, factor: float, soft_cap: float = 0.0) -> torch.Tensor:
        return self._native.scale(x, factor, soft_cap)


@dataclass(slots=True)
class NativeRotation(Rotation):
    """A table of angles, and the positions of the step's tokens, [T] int64."""

    table: RotaryTable
    positions: torch.Tensor


@dataclass(slots=True)
class NativeAttentionMetadata(AttentionMetadata):
    """The step's layout, which the kernels read as it is."""

    layout: BatchLayout


class NativeAttentionBackend(TorchAttentionBackend):
    """See AttentionBackend."""

    def __init__(self, device: torch.device, native: NativeLibrary) -> None:
        super().__init__(device, torch.float32)
        self._native = native

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> NativeRotation:  # type: ignore[override]
        return NativeRotation(table, positions)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: Rotation | None,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        assert rotation is None or isinstance(rotation, NativeRotation)
        given = None if rotation is None else (rotation.table, rotation.positions)
        return self._native.rotate_and_store(qkv, heads, norm, given, kv_cache, metadata.slot_mapping)

    def prepare(self, layout: BatchLayout) -> NativeAttentionMetadata:  # type: ignore[override]
        return NativeAttentionMetadata(torch.from_numpy(layout.slot_mapping), layout)

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        assert isinstance(metadata, NativeAttentionMetadata)
        return self._native.attend(query, kv_cache, metadata.layout, spec)
