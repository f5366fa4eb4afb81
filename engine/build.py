"""From a worker's configuration to a runner ready to take plans."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.attention.backend import HeadLayout
from engine.config import WorkerConfig
from engine.device import device_name, dtype_name, pick_device, pick_dtype
from engine.dispatch.facts import WorkerFacts
from engine.kv_cache import GIB, KVCacheShape, KVCacheSize, allocate_kv_pool, size_kv_cache
from engine.layers.parallel import TensorParallel
from engine.loader.load import load_model
from engine.model_config import ModelConfig, load_model_config
from engine.models.base import CausalLM, ModelContext
from engine.platform import CpuPlatform, Platform
from engine.row_ledger import RowLimits
from engine.runner import LoadedWorker, Runner
from engine.timeline import Timeline
from pagewire.errors import ConfigError
from pagewire.hub import resolve_checkpoint

logger = logging.getLogger(__name__)

MakePlatform = Callable[[WorkerConfig, torch.device, torch.dtype], Platform]
# Fills the parameters of a model that it makes.
Load = Callable[[ModelContext], CausalLM]
# Starts compiling what a worker of these configurations will launch; returns what waits for it.
CompileAhead = Callable[[WorkerConfig, ModelConfig, torch.dtype], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A runner and the limits it was made for."""

    runner: Runner
    size: KVCacheSize
    kv_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int


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
    device = pick_device(config.device)
    directory, load_format = resolve_checkpoint(config.model, config.load_format)
    model_config = load_model_config(directory)
    dtype = pick_dtype(config.dtype, device, model_config.dtype)
    platform = (make_platform or _platform_for(device))(config, device, dtype)
    compiled = compile_ahead(config, model_config, dtype) if compile_ahead else None

    def load(context: ModelContext) -> CausalLM:
        timeline.mark("configuration")
        model = load_model(context, directory, load_format, device=device, dtype=dtype, seed=config.seed)
        timeline.mark("weights")
        if compiled:
            compiled()
            timeline.mark("kernels")
        return model

    def on_sized(size: KVCacheSize) -> None:
        timeline.mark("memory")
        if compile_ahead and size.max_model_len != _max_model_len(config, model_config):
            compile_ahead(replace(config, max_model_len=size.max_model_len), model_config, dtype)()
            timeline.mark("kernels")

    assembly = assemble(config, model_config, platform, load, on_sized)
    timeline.mark("graphs" if device.type == "cuda" else "runner")
    facts = WorkerFacts(
        model=config.model,
        vocab_size=model_config.vocab_size,
        max_model_len=assembly.size.max_model_len,
        eos_token_ids=model_config.eos_token_ids,
        block_size=config.block_size,
        num_blocks=assembly.size.num_blocks,
        max_num_seqs=assembly.max_num_seqs,
        max_num_batched_tokens=assembly.max_num_batched_tokens,
        dtype=dtype_name(dtype),
        device=device_name(device),
        hidden_size=model_config.hidden_size,
    )
    logger.info(
        "%s: %s on %s, KV pool of %d blocks (%.2f GiB)",
        facts.model,
        facts.dtype,
        facts.device,
        facts.num_blocks,
        assembly.kv_bytes / GIB,
    )
    return LoadedWorker(assembly.runner, facts)


def assemble(
    config: WorkerConfig,
    model_config: ModelConfig,
    platform: Platform,
    load: Load,
    on_sized: Callable[[KVCacheSize], None],
) -> Assembly:
    """Puts a model, a KV pool and rows together on a platform's device.

    Args:
        load: makes the model.
        on_sized: told the size of the KV pool before it is allocated.

    Raises:
        ConfigError: a setting is wrong, or the memory does not suffice.
    """
    max_num_seqs = config.max_num_seqs or platform.limits.max_num_seqs
    max_tokens = config.max_num_batched_tokens or platform.limits.max_num_batched_tokens
    wanted_len = _max_model_len(config, model_config)
    parallel = TensorParallel()
    backend = platform.attention(_heads(model_config, parallel), max_num_seqs)
    context = ModelContext(
        model_config, wanted_len, backend, platform.ops(), platform.linear_method(), parallel
    )
    model = load(context)
    shape = KVCacheShape(
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=platform.dtype,
    )

    def make_runner(size: KVCacheSize) -> Runner:
        kv_pool = allocate_kv_pool(shape, size.num_blocks, platform.device)
        limits = RowLimits(
            max_num_seqs,
            size.max_model_len,
            config.block_size,
            size.num_blocks,
            model_config.vocab_size,
            model_config.hidden_size,
        )
        return platform.make_runner(model, backend, kv_pool, limits, max_tokens)

    def make_trial() -> Runner:
        return make_runner(KVCacheSize(1, wanted_len))

    size = size_kv_cache(
        shape,
        num_blocks=config.num_blocks,
        available_bytes=platform.bytes_for_kv(make_trial),
        max_model_len=wanted_len,
        max_num_seqs=max_num_seqs,
    )
    on_sized(size)
    runner = make_runner(size)
    platform.finish(runner)
    return Assembly(runner, size, size.num_blocks * shape.block_bytes, max_num_seqs, max_tokens)


def _platform_for(device: torch.device) -> MakePlatform:
    if device.type == "cpu":
        return CpuPlatform
    from engine.cuda.platform import CudaPlatform  # imports Triton, which a CPU has no use for

    return CudaPlatform


def _heads(config: ModelConfig, parallel: TensorParallel) -> HeadLayout:
    """This rank's heads; key-value heads are replicated where there are more ranks than heads."""
    num_kv_heads = max(1, config.num_key_value_heads // parallel.size)
    return HeadLayout(config.num_attention_heads // parallel.size, num_kv_heads, config.head_dim)


def _max_model_len(config: WorkerConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len is {wanted}; this model was made for at most {longest} tokens")
    return wanted
