"""What depends on the kind of device: how layers compute, what runs plans, how much memory is left for KV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from engine.attention.backend import AttentionBackend, HeadLayout
from engine.attention.torch_backend import TorchAttentionBackend
from engine.config import WorkerConfig
from engine.device import CPU_LIMITS, DeviceLimits
from engine.kv_cache import KVPool, default_cpu_bytes
from engine.layers.linear_method import DenseMethod, LinearMethod, PackedCpuMethod
from engine.layers.ops import LayerOps
from engine.layers.torch_ops import TorchLayerOps
from engine.model_runner import ModelRunner
from engine.models.base import CausalLM
from engine.request_rows import RequestRows
from engine.row_ledger import RowLimits
from engine.runner import Runner
from pagewire.errors import ConfigError

# Makes a runner with a pool just large enough for the largest step.
MakeTrial = Callable[[], Runner]


class Platform(ABC):
    """One kind of device.

    Attributes:
        device, dtype: of everything a model computes.
        limits: how much it computes at once by default.
    """

    limits: DeviceLimits

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    @abstractmethod
    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        """How layers attend."""

    @abstractmethod
    def ops(self) -> LayerOps:
        """How layers compute what lies between matrix products."""

    @abstractmethod
    def linear_method(self) -> LinearMethod:
        """How layers multiply."""

    @abstractmethod
    def make_runner(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_pool: KVPool,
        limits: RowLimits,
        max_num_batched_tokens: int,
    ) -> Runner:
        """What runs plans, with rows of its own."""

    @abstractmethod
    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        """Memory for the KV pool, found once the weights are loaded.

        Raises:
            ConfigError: the limits leave none.
        """

    def finish(self, runner: Runner) -> None:  # noqa: B027 - some have nothing to do
        """Called once, when the runner has its KV pool and before it gets its first plan."""


class CpuPlatform(Platform):
    """Torch operators."""

    limits = CPU_LIMITS

    def __init__(self, config: WorkerConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        if config.deterministic:
            raise ConfigError("deterministic needs a GPU; on the CPU sums depend on the batch")
        self._kv_cache_memory = config.kv_cache_memory

    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        return TorchAttentionBackend(self.device, self.dtype)

    def ops(self) -> LayerOps:
        return TorchLayerOps(self.device)

    def linear_method(self) -> LinearMethod:
        return PackedCpuMethod() if PackedCpuMethod.is_available() else DenseMethod()

    def make_runner(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_pool: KVPool,
        limits: RowLimits,
        max_num_batched_tokens: int,
    ) -> Runner:
        assert isinstance(backend, TorchAttentionBackend)
        rows = RequestRows(limits, self.device)
        return ModelRunner(model, backend, kv_pool, rows, max_num_batched_tokens=max_num_batched_tokens)

    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        return default_cpu_bytes() if self._kv_cache_memory is None else self._kv_cache_memory
