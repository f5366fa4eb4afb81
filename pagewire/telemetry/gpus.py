"""Utilisation and memory of this machine's GPUs, read through NVML.

It needs nvidia-ml-py, the extra pagewire[nvml].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU now.

    Attributes:
        index: NVML's number of the GPU, which is nvidia-smi's.
        uuid: such as "GPU-1b2c...".
        utilization: share of the last moments in which a kernel ran, 0 to 1.
        memory_used, memory_total: bytes, of all processes together.
    """

    index: int
    uuid: str
    utilization: float
    memory_used: int
    memory_total: int


class Gpus:
    """Reads the GPUs that NVML knows; none where nvidia-ml-py, the driver or a GPU is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._is_missing = False

    def read(self) -> list[GpuReading]:
        """All GPUs now. It takes up to some milliseconds for each: call it in a thread."""
        nvml = self._load()
        if nvml is None:
            return []
        try:
            return [_reading(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            logger.debug("NVML does not answer: %s", error)
            return []

    def _load(self) -> Any:
        if self._nvml is None and not self._is_missing:
            try:
                nvml = import_module("pynvml")
            except ImportError:
                self._is_missing = True
                return None
            try:
                nvml.nvmlInit()
            except nvml.NVMLError as error:
                self._is_missing = True
                logger.info("no GPU metrics: NVML cannot be used here: %s", error)
                return None
            self._nvml = nvml
        return self._nvml


def _reading(nvml: Any, index: int) -> GpuReading:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    return GpuReading(
        index,
        uuid.decode() if isinstance(uuid, bytes) else uuid,
        nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        memory.used,
        memory.total,
    )
