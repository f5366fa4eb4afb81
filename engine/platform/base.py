"""What depends on the kind of device: how layers compute, what runs plans, how much memory is left for KV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from engine.attention.interface import AttentionBackend, HeadLayout
from engine.dispatch.limits import EngineLimits
from engine.layers.adapters import LayerSlots, LinearAdapters
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import LinearMethods
from engine.layers.ops import LayerOps
from engine.models.base import CausalLM
from engine.parallel.communicator import Communicator
from engine.parallel.exchange import PeerExchange
from engine.platform.device import DeviceDefaults
from engine.platform.kv_cache import KVPool
from engine.quant.products import LayoutProducts
from engine.step.runner import Runner

# Makes a runner with a pool just large enough for the largest step.
MakeTrial = Callable[[], Runner]


class Platform(ABC):
    """One kind of device.

    Attributes:
        device, dtype: of everything a model computes.
        defaults: how much it computes at once unless the user says otherwise.
    """

    defaults: DeviceDefaults

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def make_current(self) -> None:  # noqa: B027 - some have nothing to do
        """Called once, before anything is on the device, in the thread that launches all of its work."""

    @abstractmethod
    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        """How layers attend."""

    @abstractmethod
    def ops(self) -> LayerOps:
        """How layers compute what lies between matrix products."""

    @abstractmethod
    def linear_methods(self) -> LinearMethods:
        """How each layer stores its weights and multiplies."""

    @abstractmethod
    def linear_adapters(self, slots: LayerSlots) -> LinearAdapters:
        """How a linear layer multiplies where tokens have adapters."""

    def layout_products(self) -> LayoutProducts:
        """How quantized layers multiply; by the reference unless a device has kernels."""
        return LayoutProducts()

    @abstractmethod
    def expert_methods(self) -> Mapping[str, ExpertMethod]:
        """How each layer's experts store their weights and multiply, by the weights' number format: "" is the
        model's own."""

    @abstractmethod
    def make_runner(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv_pool: KVPool,
        limits: EngineLimits,
    ) -> Runner:
        """What runs plans, with rows of its own."""

    @abstractmethod
    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        """Memory for the KV pool, found once the weights are loaded.

        Raises:
            ConfigError: the limits leave none.
        """

    def met(self, runner: Runner, communicator: Communicator) -> None:  # noqa: B027 - some have nothing to do
        """Called whenever the ranks of the group have met, before the first plan.

        Raises:
            OSError: this rank cannot go on with the others.
        """

    def peers(self, rank: int, size: int) -> PeerExchange | None:
        """A faster way than a library's to those that share layers, for small tensors; None for none."""
        return None

    def kernels(self) -> str:
        """What computes, such as "native avx2, 2 threads"; "" where there is nothing to tell."""
        return ""

    def weights(self, model: CausalLM) -> Mapping[str, int]:
        """Bytes of a loaded model's weights by number format, the most first; empty where nobody counted."""
        return {}

    def finish(self, runner: Runner) -> None:  # noqa: B027 - some have nothing to do
        """Called once, when the runner has its KV pool and before it gets its first plan."""
