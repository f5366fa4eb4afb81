"""From a worker's configuration to a runner ready to take plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from engine.config import WorkerConfig
from engine.cpu.platform import CpuPlatform
from engine.dispatch.facts import WorkerFacts
from engine.layers.parallel import TensorParallel
from engine.loader.fingerprint import fingerprint
from engine.loader.load import load_model
from engine.lora.host import AdapterHost
from engine.lora.slots import make_slots
from engine.models.base import CausalLM, ModelContext
from engine.models.config import ModelConfig
from engine.models.families import load_model_config
from engine.parallel.communicator import Communicator
from engine.platform.assemble import assemble, max_model_len
from engine.platform.base import Platform
from engine.platform.device import device_name, dtype_name, fitting, pick_device, pick_dtype, pick_kv_dtype
from engine.platform.kv_cache import GIB, KVCacheSize
from engine.step.runner import LoadedWorker
from engine.worker.timeline import Timeline
from pagewire.base.errors import ConfigError
from pagewire.hub import resolve_checkpoint

logger = logging.getLogger(__name__)

MakePlatform = Callable[[WorkerConfig, torch.device, torch.dtype], Platform]
# Starts compiling what a worker of these configurations will launch; returns what waits for it.
CompileAhead = Callable[[WorkerConfig, ModelConfig, torch.dtype], Callable[[], None]]


def build_worker(
    config: WorkerConfig,
    make_platform: MakePlatform | None = None,
    *,
    compile_ahead: CompileAhead | None = None,
    timeline: Timeline | None = None,
) -> LoadedWorker:
    """Loads the model, allocates the KV pool and the rows.

    Args:
        make_platform: what to run it with; by default what suits the device.
        compile_ahead: compiles kernels while weights are loaded; without it each is compiled when it is first
            launched.
        timeline: told what took how long.

    Raises:
        ConfigError: a setting or a model file is wrong, or the memory does not suffice.
    """
    timeline = timeline or Timeline()
    device = pick_device(config.device, config.rank)
    directory, load_format = resolve_checkpoint(config.model, config.load_format)
    model_config = load_model_config(directory, config.quantization)
    dtype = pick_dtype(config.dtype, device, model_config.dtype)
    _require_invariant_products(config, model_config)
    platform = (make_platform or _platform_for(device))(config, device, dtype)
    compiled = compile_ahead(config, model_config, dtype) if compile_ahead else None
    platform.make_current()
    communicator = _communicator(config, platform) if config.world_size > 1 else None
    size = config.tensor_parallel_size
    parallel = TensorParallel(config.rank % size, size, communicator)

    hosts: list[AdapterHost] = []

    def load(context: ModelContext) -> CausalLM:
        timeline.mark("configuration")
        model = load_model(context, directory, load_format, device=device, dtype=dtype, seed=config.seed)
        timeline.mark("weights")
        if config.enable_lora:
            hosts.append(_make_adapters(config, platform, model))
        if compiled:
            compiled()
            timeline.mark("kernels")
        return model

    def on_sized(size: KVCacheSize) -> None:
        timeline.mark("memory")
        if compile_ahead and size.max_model_len != max_model_len(config, model_config):
            compile_ahead(replace(config, max_model_len=size.max_model_len), model_config, dtype)()
            timeline.mark("kernels")

    assembly = assemble(config, model_config, platform, load, on_sized, parallel)
    timeline.mark("graphs" if device.type == "cuda" else "runner")
    facts = WorkerFacts(
        model=config.model,
        limits=assembly.limits,
        eos_token_ids=model_config.eos_token_ids,
        dtype=dtype_name(dtype),
        device=device_name(device),
        rank=config.rank,
        world_size=config.world_size,
        num_stages=config.pipeline_parallel_size,
        fingerprint=fingerprint(
            directory, load_format, config.seed, config.quantization, config.kv_cache_dtype
        ),
        task=assembly.model.task,
        labels=assembly.model.labels,
        kernels=platform.kernels(),
        weights=_in_words(assembly.weights),
        quantization="" if model_config.quantization is None else model_config.quantization.summary,
        kv_cache_dtype=dtype_name(pick_kv_dtype(config.kv_cache_dtype, dtype)),
    )
    logger.info(
        "%s: %s%s on %s, KV pool of %d blocks of %s (%.2f GiB)",
        facts.model,
        facts.dtype,
        facts.quantization and f", weights {facts.quantization}",
        facts.device,
        facts.limits.num_blocks,
        facts.kv_cache_dtype,
        assembly.kv_bytes / GIB,
    )
    if facts.kernels:
        logger.info("kernels: %s; weights: %s", facts.kernels, facts.weights)
    met = None
    if communicator is not None:
        met = partial(platform.met, assembly.runner, communicator)
    return LoadedWorker(assembly.runner, facts, communicator, hosts[0] if hosts else None, met)


def _communicator(config: WorkerConfig, platform: Platform) -> Communicator:
    size = config.tensor_parallel_size
    return Communicator(
        config.rank,
        config.world_size,
        platform.device,
        tensor_parallel_size=size,
        peers=platform.peers(config.rank % size, size) if size > 1 else None,
    )


def _make_adapters(config: WorkerConfig, platform: Platform, model: CausalLM) -> AdapterHost:
    """Gives the model's layers memory for adapters."""
    with fitting(platform.device, f"memory for {config.max_loras} adapters of rank {config.max_lora_rank}"):
        slots = make_slots(
            model,
            config,
            device=platform.device,
            dtype=platform.dtype,
            make=platform.linear_adapters,
        )
    logger.info(
        "adapters: %d slots of rank %d, %.2f GiB", config.max_loras, slots.max_rank, slots.num_bytes / GIB
    )
    return AdapterHost(
        slots,
        max_rank=config.max_lora_rank,
        max_kept=config.max_cpu_loras,
        pin=platform.device.type == "cuda",
    )


def _require_invariant_products(config: WorkerConfig, model: ModelConfig) -> None:
    """Raises:
    ConfigError: results are to be the same in any batch, and not all products have a kernel for that.
    """
    quantization = model.quantization
    if config.deterministic and quantization is not None and not quantization.has_invariant_products:
        raise ConfigError(
            f"deterministic is not available with FP8 weights whose inputs are not quantized "
            f"({quantization.summary}): their products depend on the batch"
        )


def _in_words(weights: Mapping[str, int]) -> str:
    """Such as "97 MB: Q4_1 66, Q6_K 31"; "" for none. Formats with less than half a MB are not named."""
    if not weights:
        return ""
    parts = ", ".join(f"{name} {count / 1e6:.0f}" for name, count in weights.items() if count >= 5e5)
    return f"{sum(weights.values()) / 1e6:.0f} MB" + (parts and f": {parts}")


def _platform_for(device: torch.device) -> MakePlatform:
    if device.type == "cpu":
        return CpuPlatform
    from engine.cuda.platform import CudaPlatform  # imports Triton, which a CPU has no use for

    return CudaPlatform
