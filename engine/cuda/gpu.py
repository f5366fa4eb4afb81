"""What CUDA's driver says of a GPU, asked without torch, so that it can be asked while torch is imported."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# Of cuda.h: CUdevice_attribute.
_MULTIPROCESSOR_COUNT = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """What kernels are compiled for.

    Attributes:
        arch: compute capability, ten times the major number plus the minor one.
        num_sms: multiprocessors, which some launches are shaped after.
    """

    arch: int
    num_sms: int

    def __str__(self) -> str:
        return f"sm_{self.arch}"


def find_gpu(index: int) -> GpuTarget | None:
    """The GPU of this number among those that CUDA_VISIBLE_DEVICES leaves; None if there is none."""
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

    Does nothing where that fails: torch will fail in the same way, and say more.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
