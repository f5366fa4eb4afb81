"""CPUs: native kernels, or torch's operators."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from engine.attention.interface import AttentionBackend, HeadLayout
from engine.config import WorkerConfig
from engine.cpu.adapters import NativeLinearAdapters
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.drafts import CpuDrafter
from engine.cpu.expert_method import PackedCpuExperts
from engine.cpu.kernels.build import BuildError
from engine.cpu.kernels.library import NativeLibrary
from engine.cpu.linear_method import PackedCpuMethod
from engine.cpu.native import NativeAttentionBackend, NativeLayerOps, open_native
from engine.cpu.native_experts import NativeExperts
from engine.cpu.native_layouts import NativeProducts
from engine.cpu.native_linear import NativeMethods
from engine.cpu.ops import TorchLayerOps
from engine.cpu.recorded_steps import RecordedSteps
from engine.cpu.rows import RequestRows
from engine.cpu.runner import CpuModelRunner
from engine.cpu.weights import weight_bytes
from engine.dispatch.limits import EngineLimits
from engine.layers.adapters import LayerSlots, LinearAdapters
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import DenseMethod, LinearMethods, SameMethod
from engine.layers.looped_experts import DenseExperts, LoopedExperts
from engine.layers.mxfp4 import Mxfp4Experts
from engine.layers.ops import LayerOps
from engine.lora.slots import TorchLinearAdapters
from engine.models.base import CausalLM
from engine.platform.base import MakeTrial, Platform
from engine.platform.device import CPU_DEFAULTS, dtype_name
from engine.platform.kv_cache import KVPool, default_cpu_bytes
from engine.quant.products import LayoutProducts
from engine.step.runner import Runner
from pagewire.base.errors import ConfigError

logger = logging.getLogger(__name__)


class CpuPlatform(Platform):
    """Native kernels where they can be compiled, torch's operators elsewhere."""

    defaults = CPU_DEFAULTS

    def __init__(self, config: WorkerConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        if config.deterministic:
            raise ConfigError(
                "deterministic needs a GPU; on a CPU native kernels give the same bits in every batch anyway"
            )
        if config.kv_cache_dtype != "auto":
            raise ConfigError(
                f"kv_cache_dtype is {config.kv_cache_dtype!r}, which needs a GPU; on the CPU it must be auto"
            )
        self._kv_cache_memory = config.kv_cache_memory
        self._speculation = config.speculation
        self._is_rank = config.world_size > 1
        # A dtype that the user names is that of weights too.
        self._keeps_formats = config.dtype == "auto"
        self._native: NativeLibrary | None = None
        self._kernels = f"torch: native kernels have no {dtype_name(dtype)}"
        if dtype == torch.float32:
            self._open_native()

    def _open_native(self) -> None:
        try:
            self._native = open_native()
        except (BuildError, OSError) as error:
            self._kernels = f"torch: no native kernels, {error}"
            logger.warning("torch computes everything, more slowly than native kernels: %s", error)
            return
        threads = "1 thread" if self._native.num_threads == 1 else f"{self._native.num_threads} threads"
        matrices = "" if self._keeps_formats else "; torch for matrices, by --dtype float32"
        self._kernels = f"native {self._native.instructions}, {threads}{matrices}"

    def kernels(self) -> str:
        return self._kernels

    def weights(self, model: CausalLM) -> Mapping[str, int]:
        return weight_bytes(model)

    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        if self._native is not None:
            return NativeAttentionBackend(self.device, self._native)
        return TorchAttentionBackend(self.device, self.dtype)

    def ops(self) -> LayerOps:
        if self._native is not None:
            return NativeLayerOps(self.device, self._native)
        return TorchLayerOps(self.device)

    def linear_methods(self) -> LinearMethods:
        plain = PackedCpuMethod() if PackedCpuMethod.is_available(self.dtype) else DenseMethod()
        if self._native is not None and self._keeps_formats:
            return NativeMethods(self._native, plain)
        return SameMethod(plain)

    def linear_adapters(self, slots: LayerSlots) -> LinearAdapters:
        if self._native is not None:
            return NativeLinearAdapters(self._native, slots)
        return TorchLinearAdapters(slots)

    def layout_products(self) -> LayoutProducts:
        if self._native is not None and self._keeps_formats:
            return NativeProducts(self._native)
        return LayoutProducts()

    def expert_methods(self) -> Mapping[str, ExpertMethod]:
        can_pack = PackedCpuMethod.is_available(self.dtype)
        plain: LoopedExperts = PackedCpuExperts() if can_pack else DenseExperts()
        if self._native is not None and self._keeps_formats:
            plain = NativeExperts(self._native, plain)
        return {"": plain, "mxfp4": Mxfp4Experts()}

    def make_runner(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_pool: KVPool,
        limits: EngineLimits,
    ) -> Runner:
        assert isinstance(backend, TorchAttentionBackend)
        rows = RequestRows(limits, self.device)
        recorded = None
        if self._native is not None and not self._is_rank:  # sums over ranks are not recorded
            recorded = RecordedSteps(self._native, model, backend, kv_pool, limits)
        drafter = None if self._speculation is None else CpuDrafter(self._speculation, rows)
        return CpuModelRunner(model, backend, kv_pool, rows, recorded, drafter)

    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        return default_cpu_bytes() if self._kv_cache_memory is None else self._kv_cache_memory
