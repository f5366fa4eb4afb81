"""From a worker's configuration to a runner ready to take plans."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention.backend import HeadLayout
from engine.config import WorkerConfig
from engine.device import device_name, dtype_name, pick_device, pick_dtype
from engine.dispatch.facts import WorkerFacts
from engine.kv_cache import GIB, KVCacheShape, KVCacheSize, allocate_kv_cache, size_kv_cache
from engine.layers.parallel import TensorParallel
from engine.loader.load import load_model
from engine.model_config import ModelConfig, load_model_config
from engine.models.base import ModelContext
from engine.platform import CpuPlatform, Platform
from engine.row_ledger import RowLimits
from engine.runner import Runner
from pagewire.errors import ConfigError
from pagewire.hub import resolve_checkpoint

logger = logging.getLogger(__name__)

MakePlatform = Callable[[WorkerConfig, torch.device, torch.dtype], Platform]


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A runner and what a scheduler is told about it."""

    runner: Runner
    facts: WorkerFacts


def build_worker(config: WorkerConfig, make_platform: MakePlatform | None = None) -> LoadedWorker:
    """Loads the model, allocates the KV pool and the rows.

    Args:
        make_platform: what to run it with; by default what suits the device.

    Raises:
        ConfigError: a setting or a model file is wrong, or the memory does not suffice.
    """
    device = pick_device(config.device)
    directory, load_format = resolve_checkpoint(config.model, config.load_format)
    model_config = load_model_config(directory)
    dtype = pick_dtype(config.dtype, device, model_config.dtype)
    platform = (make_platform or _platform_for(device))(config, device, dtype)
    max_num_seqs = config.max_num_seqs or platform.limits.max_num_seqs
    max_tokens = config.max_num_batched_tokens or platform.limits.max_num_batched_tokens
    wanted_len = _max_model_len(config, model_config)
    parallel = TensorParallel()
    backend = platform.attention(_heads(model_config, parallel), max_num_seqs)
    context = ModelContext(
        model_config, wanted_len, backend, platform.ops(), platform.linear_method(), parallel
    )
    model = load_model(context, directory, load_format, device=device, dtype=dtype, seed=config.seed)
    shape = KVCacheShape(
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=dtype,
    )

    def make_runner(size: KVCacheSize) -> Runner:
        kv_caches = allocate_kv_cache(shape, size.num_blocks, device)
        limits = RowLimits(
            max_num_seqs, size.max_model_len, config.block_size, size.num_blocks, model_config.vocab_size
        )
        return platform.make_runner(model, backend, kv_caches, limits, max_tokens)

    def make_trial() -> Runner:
        return make_runner(KVCacheSize(1, wanted_len))

    size = size_kv_cache(
        shape,
        num_blocks=config.num_blocks,
        available_bytes=platform.bytes_for_kv(make_trial),
        max_model_len=wanted_len,
        max_num_seqs=max_num_seqs,
    )
    runner = make_runner(size)
    platform.finish(runner)
    facts = WorkerFacts(
        model=config.model,
        vocab_size=model_config.vocab_size,
        max_model_len=size.max_model_len,
        eos_token_ids=model_config.eos_token_ids,
        block_size=config.block_size,
        num_blocks=size.num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        dtype=dtype_name(dtype),
        device=device_name(device),
    )
    logger.info(
        "%s: %s on %s, KV pool of %d blocks (%.2f GiB)",
        facts.model,
        facts.dtype,
        facts.device,
        size.num_blocks,
        size.num_blocks * shape.block_bytes / GIB,
    )
    return LoadedWorker(runner, facts)


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
