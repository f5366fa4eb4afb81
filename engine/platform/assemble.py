"""Puts a model, a KV pool and rows together on a platform's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.attention.interface import HeadLayout
from engine.config import WorkerConfig
from engine.dispatch.limits import MAX_STEP_DRAFT_TOKENS, EngineLimits
from engine.layers.attention import Attention
from engine.layers.parallel import SplitError, TensorParallel
from engine.models.base import CausalLM, ModelContext
from engine.models.config import ModelConfig
from engine.models.kv_groups import KVGroups, kv_groups
from engine.models.stages import Stage, stage_of
from engine.platform.base import Platform
from engine.platform.device import pick_kv_dtype
from engine.platform.kv_cache import KVCacheShape, KVCacheSize, allocate_kv_pool, size_kv_cache
from engine.step.runner import Runner
from pagewire.base.errors import ConfigError

# Fills the parameters of a model that it makes.
Load = Callable[[ModelContext], CausalLM]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A runner, the configuration of its model as loaded, the limits it was made for, the bytes of its KV
    pool, and of weights by number format."""

    runner: Runner
    model: ModelConfig
    limits: EngineLimits
    kv_bytes: int
    weights: Mapping[str, int]


def assemble(
    config: WorkerConfig,
    model_config: ModelConfig,
    platform: Platform,
    load: Load,
    on_sized: Callable[[KVCacheSize], None],
    parallel: TensorParallel,
) -> Assembly:
    """Puts a model, a KV pool and rows together on a platform's device.

    Args:
        load: makes the model.
        on_sized: told the size of the KV pool before it is allocated.
        parallel: this worker's place among those that share the model.

    Raises:
        ConfigError: a setting is wrong, or the memory does not suffice.
    """
    max_num_seqs = config.max_num_seqs or platform.defaults.max_num_seqs
    max_tokens = config.max_num_batched_tokens or platform.defaults.max_num_batched_tokens
    wanted_len = max_model_len(config, model_config)
    speculation = config.speculation
    max_slots = max_num_seqs
    if speculation is not None:  # a draft is computed as one more decode
        max_slots += min(max_num_seqs * speculation.num_speculative_tokens, MAX_STEP_DRAFT_TOKENS)
    backend = platform.attention(_heads(model_config, parallel), max_slots)
    stage = _stage(config, model_config)
    context = ModelContext(
        model_config,
        wanted_len,
        backend,
        platform.ops(),
        platform.linear_methods(),
        parallel,
        platform.expert_methods(),
        platform.layout_products(),
        stage,
    )
    model = load(context)
    of_all = kv_groups(tuple(layer.sliding_window for layer in model_config.layers), wanted_len)
    groups = of_all.of_layers(stage.layers) if stage.layers is not None else of_all
    _set_kv_groups(model, groups)
    shape = KVCacheShape(
        groups=groups,
        num_kv_heads=model.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=pick_kv_dtype(config.kv_cache_dtype, platform.dtype),
    )

    scales = [layer.kv_scales for layer in _attention_layers(model)]

    def limits_of(size: KVCacheSize) -> EngineLimits:
        return EngineLimits(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.hidden_size,
            num_labels=len(model_config.labels),
            max_model_len=size.max_model_len,
            block_size=config.block_size,
            num_blocks=size.num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            kv_windows=groups.windows,
            max_loras=config.max_loras if config.enable_lora else 0,
            max_tokens_per_step=1 if speculation is None else 1 + speculation.num_speculative_tokens,
        )

    def make_runner(limits: EngineLimits, num_blocks: int) -> Runner:
        kv_pool = allocate_kv_pool(shape, num_blocks, platform.device, scales)
        return platform.make_runner(model, backend, kv_pool, limits)

    def make_trial() -> Runner:
        # Its steps are all padding, which refers to no block.
        num_blocks = -(-wanted_len // config.block_size) * len(groups.windows)
        one_request = KVCacheSize(num_blocks, wanted_len)
        return make_runner(limits_of(one_request), 1)

    size = size_kv_cache(
        shape,
        num_blocks=config.num_blocks,
        available_bytes=platform.bytes_for_kv(make_trial),
        max_model_len=wanted_len,
        max_num_seqs=max_num_seqs,
    )
    on_sized(size)
    limits = limits_of(size)
    runner = make_runner(limits, limits.num_blocks)
    platform.finish(runner)
    kv_bytes = limits.num_blocks * shape.block_bytes
    return Assembly(runner, model.config, limits, kv_bytes, platform.weights(model))


def max_model_len(config: WorkerConfig, model: ModelConfig) -> int:
    """The longest request that a worker is asked to serve.

    Raises:
        ConfigError: the model was not made for so many tokens.
    """
    longest = model.longest_context or model.max_position_embeddings
    wanted = config.max_model_len or model.max_position_embeddings
    if wanted > longest:
        raise ConfigError(f"max_model_len is {wanted}; this model was made for at most {longest} tokens")
    return wanted


def _set_kv_groups(model: CausalLM, groups: KVGroups) -> None:
    """Tells every attention layer, from the first to the last, its KV group."""
    for layer, group in zip(_attention_layers(model), groups.group_of, strict=True):
        layer.kv_group = group


def _attention_layers(model: CausalLM) -> list[Attention]:
    """From the first to the last."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def _stage(config: WorkerConfig, model: ModelConfig) -> Stage:
    """Raises:
    ConfigError: the model has too few layers.
    """
    index = config.rank // config.tensor_parallel_size
    try:
        return stage_of(model, index, config.pipeline_parallel_size)
    except SplitError as error:
        raise ConfigError(f"pipeline_parallel_size is {config.pipeline_parallel_size}: {error}") from error


def _heads(config: ModelConfig, parallel: TensorParallel) -> HeadLayout:
    """This rank's heads.

    Raises:
        ConfigError: so many ranks cannot share them.
    """
    try:
        share = parallel.share_heads(config.num_attention_heads, config.num_key_value_heads)
    except SplitError as error:
        raise ConfigError(f"tensor_parallel_size is {parallel.size}: {error}") from error
    return HeadLayout(share.heads.size, share.kv_heads.size, config.head_dim)
