"""From a worker's configuration to a runner ready to take plans."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from engine.attention.torch_backend import TorchAttentionBackend
from engine.config import WorkerConfig
from engine.device import device_limits, device_name, dtype_name, pick_device, pick_dtype
from engine.dispatch.facts import WorkerFacts
from engine.kv_cache import (
    GIB,
    KVCacheShape,
    KVCacheSize,
    allocate_kv_cache,
    default_cpu_bytes,
    size_kv_cache,
)
from engine.layers.linear_method import DenseMethod, LinearMethod, PackedCpuMethod
from engine.layers.parallel import TensorParallel
from engine.layers.torch_ops import TorchLayerOps
from engine.loader.load import load_model
from engine.memory_profile import cuda_bytes_for_kv
from engine.model_config import ModelConfig, load_model_config
from engine.model_runner import ModelRunner
from engine.models.base import CausalLM, ModelContext
from engine.request_rows import RequestRows
from engine.row_ledger import RowLimits
from pagewire.errors import ConfigError
from pagewire.hub import resolve_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A runner and what a scheduler is told about it."""

    runner: ModelRunner
    facts: WorkerFacts


def build_worker(config: WorkerConfig) -> LoadedWorker:
    """Loads the model, allocates the KV pool and the rows.

    Raises:
        ConfigError: a setting or a model file is wrong, or the memory does not suffice.
    """
    device = pick_device(config.device)
    directory, load_format = resolve_checkpoint(config.model, config.load_format)
    model_config = load_model_config(directory)
    dtype = pick_dtype(config.dtype, device, model_config.dtype)
    limits = device_limits(device)
    max_num_seqs = config.max_num_seqs or limits.max_num_seqs
    max_tokens = config.max_num_batched_tokens or limits.max_num_batched_tokens
    wanted_len = _max_model_len(config, model_config)
    backend = TorchAttentionBackend(device, dtype)
    ops = TorchLayerOps(device)
    context = ModelContext(model_config, wanted_len, backend, ops, _linear_method(device), TensorParallel())
    model = load_model(context, directory, load_format, device=device, dtype=dtype, seed=config.seed)
    shape = KVCacheShape(
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=dtype,
    )
    make_runner = partial(
        _make_runner, model, backend, shape, model_config.vocab_size, max_num_seqs, max_tokens
    )
    if device.type == "cpu":
        available = config.kv_cache_memory if config.kv_cache_memory is not None else default_cpu_bytes()
    else:
        longest_step = min(wanted_len, max_tokens)
        trial = make_runner(KVCacheSize(-(-longest_step // config.block_size), wanted_len), device)
        available = cuda_bytes_for_kv(trial, config.gpu_memory_utilization)
        del trial
    size = size_kv_cache(
        shape,
        num_blocks=config.num_blocks,
        available_bytes=available,
        max_model_len=wanted_len,
        max_num_seqs=max_num_seqs,
    )
    runner = make_runner(size, device)
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


def _make_runner(
    model: CausalLM,
    backend: TorchAttentionBackend,
    shape: KVCacheShape,
    vocab_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    size: KVCacheSize,
    device: torch.device,
) -> ModelRunner:
    limits = RowLimits(max_num_seqs, size.max_model_len, shape.block_size, size.num_blocks, vocab_size)
    rows = RequestRows(limits, device)
    kv_caches = allocate_kv_cache(shape, size.num_blocks, device)
    return ModelRunner(model, backend, kv_caches, rows, max_num_batched_tokens=max_num_batched_tokens)


def _linear_method(device: torch.device) -> LinearMethod:
    packed = device.type == "cpu" and PackedCpuMethod.is_available()
    return PackedCpuMethod() if packed else DenseMethod()


def _max_model_len(config: WorkerConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len is {wanted}; this model was made for at most {longest} tokens")
    return wanted
