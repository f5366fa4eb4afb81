"""Which kernels a worker launches: found by launching them all without a GPU.

The worker's own code runs on torch's "meta" device, where tensors have shapes and no memory, and Triton is
told to note what it should compile instead of compiling it. So the list is what is launched, by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget

from engine.attention.interface import AttentionBackend, HeadLayout
from engine.config import WorkerConfig
from engine.cuda.attention import TritonAttentionBackend
from engine.cuda.gpu import GpuTarget
from engine.cuda.graphs import GraphSize, mixed_graph_sizes
from engine.cuda.linear_method import CudaLinearMethod, InvariantMethod
from engine.cuda.platform import CudaPlatform
from engine.cuda.quantized_products import cuda_layout_products
from engine.cuda.runner import CudaModelRunner
from engine.kernels.linear.matrix_vector import MAX_TOKENS
from engine.layers.experts import ExpertMethod
from engine.layers.linear_method import LinearMethods, SameMethod
from engine.layers.parallel import TensorParallel
from engine.loader.load import create_model
from engine.lora.slots import make_slots
from engine.models.base import CausalLM, ModelContext
from engine.models.config import LayerConfig, ModelConfig
from engine.models.kv_groups import kv_groups
from engine.parallel.communicator import Communicator
from engine.platform.assemble import assemble, max_model_len
from engine.platform.base import MakeTrial
from engine.platform.device import pick_kv_dtype
from engine.quant.products import LayoutProducts
from engine.step.runner import Runner
from engine.warmup.quantized import (
    RehearsedExperts,
    RehearsedFp8,
    RehearsedFp8Experts,
    with_rehearsed_layers,
)

# The first layer differs from the second, and all others of its kind are like that one.
_FEWEST_LAYERS = 2
# Bytes: the pool is cut to what the rows can use.
_AS_MUCH_AS_WANTED = 1 << 60


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """A kernel as compiled for some launches.

    Attributes:
        module, name: where its function is.
        specialization: types, constants and options, as Triton writes them down for `preload`.
    """

    module: str
    name: str
    specialization: str


class CompileOnlyDriver:
    """Stands in for a GPU where nothing is launched."""

    def __init__(self, target: GpuTarget) -> None:
        self._target = GPUTarget("cuda", target.arch, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The number under which Triton keeps what it compiled."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """None."""
        return 0


def find_kernels(
    config: WorkerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    target: GpuTarget,
    found: Callable[[KernelVariant], None],
) -> None:
    """Tells `found` every kernel that a worker of this configuration launches, each variant once.

    Triton's driver must be a CompileOnlyDriver.
    """
    model = replace(model, layers=_layers_of_every_kind(config, model))
    device = torch.device("meta")
    platform = _RehearsalPlatform(config, device, dtype, target.num_sms)

    def load(context: ModelContext) -> CausalLM:
        model = create_model(with_rehearsed_layers(context, config), device, dtype)
        if config.enable_lora:
            make_slots(model, config, device=device, dtype=dtype, make=platform.linear_adapters)
        return model

    with _noted_launches(found):
        assemble(config, model, platform, load, lambda size: None, _alone(config, device))


def _alone(config: WorkerConfig, device: torch.device) -> TensorParallel:
    """A rank that has met nobody, with its part of every matrix."""
    size = config.tensor_parallel_size
    communicator = Communicator(config.rank, config.world_size, device, tensor_parallel_size=size)
    return TensorParallel(config.rank % size, size, communicator if config.world_size > 1 else None)


def _layers_of_every_kind(config: WorkerConfig, model: ModelConfig) -> tuple[LayerConfig, ...]:
    """The model's first layers, as few as launch what all do."""

    def num_groups(layers: tuple[LayerConfig, ...]) -> int:
        windows = tuple(layer.sliding_window for layer in layers)
        return len(kv_groups(windows, max_model_len(config, model)).windows)

    num_layers = max(_FEWEST_LAYERS, *(model.layers.index(layer) + 1 for layer in set(model.layers)))
    first = model.layers[:num_layers]
    # Several KV groups take a kernel more, and a part of the layers may be one group where all are several.
    return model.layers if num_groups(first) == 1 < num_groups(model.layers) else first


class _RehearsedLinear(CudaLinearMethod):
    """Leaves out torch's products: the first on the meta device imports a computer algebra system."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if self.choose(weight, x.shape[0]) is None:
            return x.new_empty(x.shape[0], weight.shape[0])
        return super().apply(layer, x, bias)


def _leave_out(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Stands for torch's product; see _RehearsedLinear."""


class _RehearsalPlatform(CudaPlatform):
    """Launches whatever a worker does, up to its first plan and in its steps, captured or not."""

    def __init__(self, config: WorkerConfig, device: torch.device, dtype: torch.dtype, num_sms: int) -> None:
        super().__init__(config, device, dtype)
        self._num_sms = num_sms

    def attention(self, heads: HeadLayout, max_num_seqs: int) -> AttentionBackend:
        return TritonAttentionBackend(
            heads,
            max_num_seqs=max_num_seqs,
            device=self.device,
            dtype=self.dtype,
            cache_dtype=pick_kv_dtype(self._config.kv_cache_dtype, self.dtype),
            deterministic=self._config.deterministic,
            num_sms=self._num_sms,
        )

    def linear_methods(self) -> LinearMethods:
        deterministic = self._config.deterministic
        return SameMethod(InvariantMethod() if deterministic else _RehearsedLinear(self.device))

    def layout_products(self) -> LayoutProducts:
        deterministic = self._config.deterministic
        # The deterministic product of dequantized weights is a kernel of ours.
        return cuda_layout_products(
            self.device,
            deterministic=deterministic,
            dense=None if deterministic else _leave_out,
            experts=partial(RehearsedExperts, deterministic=deterministic),
            fp8_products=RehearsedFp8,
        )

    def expert_methods(self) -> Mapping[str, ExpertMethod]:
        of_fp8 = RehearsedFp8Experts(deterministic=self._config.deterministic)
        return {**super().expert_methods(), "fp8": of_fp8}

    def bytes_for_kv(self, make_trial: MakeTrial) -> int:
        trial = make_trial()
        assert isinstance(trial, CudaModelRunner)
        trial.rehearse(trial.largest_shape)
        return _AS_MUCH_AS_WANTED

    def finish(self, runner: Runner) -> None:
        assert isinstance(runner, CudaModelRunner)
        # Products of a few tokens are compiled for their number. What takes longest is in here too.
        runner.rehearse_sizes([GraphSize(0, 1, count, False) for count in range(1, MAX_TOKENS + 1)])
        if runner.rows.limits.max_loras:
            runner.rehearse_sizes([GraphSize(0, 1, count, False, True) for count in range(1, MAX_TOKENS + 1)])
        runner.rehearse_sizes(self._graph_sizes(runner))
        limits = runner.rows.limits
        # Which of these get graphs depends on the whole model; the others are launched as they come.
        runner.rehearse_sizes(mixed_graph_sizes(limits.max_num_seqs, limits.max_num_batched_tokens))
        runner.rehearse_prompts()


@contextmanager
def _noted_launches(found: Callable[[KernelVariant], None]) -> Iterator[None]:
    """While it lasts launches compile nothing and do nothing, but are told."""
    seen: set[tuple[str, str, str]] = set()

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (fn.module, fn.name, key) not in seen:
            seen.add((fn.module, fn.name, key))
            found(KernelVariant(fn.module, fn.name, compile["specialization_data"]))
        return True  # as if it had been compiled elsewhere: Triton then launches nothing

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before
