"""Filling the cache of compiled kernels before the first worker starts, with or without a GPU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget, find_gpu
from engine.models.families import load_model_config
from engine.platform.device import pick_dtype
from engine.warmup.compile_ahead import AheadCompiler, CompiledKernel, use_kernel_cache
from pagewire.base.errors import ConfigError, PagewireError
from pagewire.hub import resolve_checkpoint
from pagewire.hub.cache import cache_home

# Of the GPUs of an architecture that have the most, where there is none to ask.
_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}


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


def warm_up(config: WorkerConfig, architecture: str | None) -> WarmedUp:
    """Compiles what a worker of this configuration would; reads nothing of the model but its configuration.

    Args:
        architecture: such as "sm_90"; by default that of the GPU here.

    Raises:
        ConfigError: there is no GPU and no architecture, a setting is wrong, or the cache cannot be written.
        PagewireError: a kernel cannot be compiled; the others are.
    """
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set; unset it, since an interpreter compiles nothing")
    target, launchable = _target(config, architecture)
    directory, _ = resolve_checkpoint(config.model, config.load_format)
    model = load_model_config(directory)
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


def _target(config: WorkerConfig, architecture: str | None) -> tuple[GpuTarget, bool]:
    """What to compile for, and whether it is here."""
    if config.device == "cpu":
        raise ConfigError("device is 'cpu'; kernels are compiled for GPUs only")
    here = find_gpu(int(config.device.partition(":")[2] or 0))
    if architecture is None:
        if here is None:
            raise ConfigError(
                "there is no GPU here to compile kernels for; name an architecture instead: --target sm_90"
            )
        return here, True
    match = re.fullmatch(r"sm_(\d+)", architecture)
    if match is None:
        raise ConfigError(f"target is {architecture!r}; it must be like sm_90", param="target")
    arch = int(match[1])
    if here is not None and here.arch == arch:
        return here, True
    if arch not in _MULTIPROCESSORS:
        known = ", ".join(f"sm_{number}" for number in _MULTIPROCESSORS)
        raise ConfigError(f"target is {architecture!r}; without such a GPU it must be one of {known}")
    return GpuTarget(arch, _MULTIPROCESSORS[arch]), False
