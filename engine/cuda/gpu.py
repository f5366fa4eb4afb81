"""Queries a GPU through the CUDA driver, without torch, so that it works while torch is being imported."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# CUdevice_attribute values from cuda.h.
_MULTIPROCESSOR_COUNT = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """The GPU that kernels are compiled for.

    Attributes:
        arch: compute capability: ten times the major number plus the minor one.
        num_sms: number of multiprocessors, which the grid of some launches depends on.
    """

    arch: int
    num_sms: int

    def __str__(self) -> str:
        return f"sm_{self.arch}"


def find_gpu(index: int) -> GpuTarget | None:
    """The GPU with this index among CUDA_VISIBLE_DEVICES; None if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    arch = 10 * attribute(_CAPABILITY_MAJOR) + attribute(_CAPABILITY_MINOR)
    return GpuTarget(arch, attribute(_MULTIPROCESSOR_COUNT))


def create_context(index: int) -> None:
    """Creates the GPU's primary context, which torch then uses. It lasts as long as the process.

    Ignores errors: torch will fail in the same way, with a better message.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
