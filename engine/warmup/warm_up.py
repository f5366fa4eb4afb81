"""Filling the cache of compiled kernels before the first worker starts, with or without a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget
from engine.models.families import load_model_config
from engine.platform.device import pick_dtype
from engine.warmup.compile_ahead import AheadCompiler, CompiledKernel, use_kernel_cache
from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError, PagewireError
from pagewire.hub import resolve_checkpoint


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """What was done.

    Attributes:
        compiled: every kernel of such a worker; empty if all were there.
    """

    directory: Path
    target: GpuTarget
    compiled: list[CompiledKernel]
    seconds: float


def warm_up(config: WorkerConfig, target: GpuTarget, *, launchable: bool) -> WarmedUp:
    """Compiles what a worker of this configuration would; reads nothing of the model but its configuration.

    Args:
        target: what to compile for.
        launchable: whether it is here (see `choose_target`).

    Raises:
        ConfigError: a setting is wrong, or the cache cannot be written.
        PagewireError: a kernel cannot be compiled; the others are.
    """
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set; unset it, since an interpreter compiles nothing")
    directory, _ = resolve_checkpoint(config.model, config.load_format)
    model = load_model_config(directory, config.quantization)
    dtype = pick_dtype(config.dtype, torch.device("cuda"), model.dtype)
    try:
        cache = use_kernel_cache(cache_home(), target)
    except OSError as error:
        raise ConfigError(
            f"the cache of kernels cannot be made: {error}; set PAGEWIRE_HOME to a directory that can be "
            "written"
        ) from error
    compiler = AheadCompiler(cache, target, launchable=launchable)
    started = time.monotonic()
    complete = compiler.is_complete(config, model, dtype)
    compiled = [] if complete else compiler.compile(config, model, dtype)
    for kernel in compiled:
        if kernel.error:
            raise PagewireError(f"{kernel.name} cannot be compiled for {target}: {kernel.error}")
    return WarmedUp(cache, target, compiled, time.monotonic() - started)
