"""Which GPU kernels are compiled for ahead of the first start. No torch: errors come at once."""

from __future__ import annotations

import re

from engine.config import WorkerConfig
from engine.cuda.gpu import GpuTarget, find_gpu
from pagewire.base.errors import ConfigError

# Of the GPUs of an architecture that have the most, where there is none to ask.
_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}


def choose_target(config: WorkerConfig, architecture: str | None) -> tuple[GpuTarget, bool]:
    """What to compile for, and whether it is here.

    Args:
        architecture: such as "sm_90"; by default that of the GPU here.

    Raises:
        ConfigError: there is no GPU and no architecture, or one that cannot be compiled for.
    """
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
