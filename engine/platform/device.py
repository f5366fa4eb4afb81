"""Which device and number format a worker uses, and the limits that suit the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pagewire.base.errors import ConfigError

MEMINFO = "/proc/meminfo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_KV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """Defaults for how much a device computes at once.

    Attributes:
        max_num_seqs: request rows.
        max_num_batched_tokens: tokens in a step. On the CPU a step of more would stall running streams for
            longer than it saves.
    """

    max_num_seqs: int
    max_num_batched_tokens: int


CPU_DEFAULTS = DeviceDefaults(max_num_seqs=64, max_num_batched_tokens=256)
CUDA_DEFAULTS = DeviceDefaults(max_num_seqs=256, max_num_batched_tokens=8192)


def pick_device(name: str, rank: int = 0) -> torch.device:
    """The device of a rank for "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N". Without a number
    each rank has a GPU of its own.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no CUDA device; use --device cpu")
    number, count = int(name.partition(":")[2] or rank), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"device is {name!r}, of which rank {rank} has number {number}, but there are {count} of CUDA"
        )
    return torch.device("cuda", number)


def pick_dtype(name: str, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """The number format of weights, activations and KV.

    "auto" is the checkpoint's own 16-bit format on CUDA (bfloat16 for any other checkpoint) and float32 on
    the CPU.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16


def pick_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The number format of keys and values: "auto" is that of activations, `dtype`."""
    return dtype if name == "auto" else _KV_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name a dtype has in configuration files."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """For people: "cpu", or "cuda:0 NVIDIA H200"."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} {torch.cuda.get_device_name(device)}"


@contextmanager
def fitting(device: torch.device, what: str) -> Iterator[None]:
    """Around allocations that a device, or the machine, may be too small for.

    Raises:
        ConfigError: it was; the message has the numbers.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        gib = 1024**3
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_allocated(device)
        raise ConfigError(
            f"{what} does not fit {device_name(device)}: of {total / gib:.2f} GiB, {ours / gib:.2f} are "
            f"taken by it so far, {free / gib:.2f} are free, and the next part is larger"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator has no class of error for this.
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"{what} does not fit the machine's memory, of which {available_memory() / 1024**3:.2f} GiB are "
            "free"
        ) from error


def available_memory() -> int:
    """Bytes of the machine's memory that programs can still get without swapping."""
    with open(MEMINFO) as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
