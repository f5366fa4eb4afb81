"""Distinguishes errors that fail one step from errors after which the device is lost to the process.

After some CUDA errors ("sticky" ones) every further call fails until the process is restarted; after others,
such as out of memory, the next step can be computed normally.
Source: CUDA Runtime API, "Data types used by CUDA Runtime", cudaError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from engine.step.runner import FinishedStep

logger = logging.getLogger(__name__)

# cudaError_t: ECC, NVLink, illegal address, timeout, destroyed context, assertion, hardware stack, illegal
# instruction, misaligned address, address space, program counter, launch failure, external device, MPS.
_LOST_CODES = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 911, 810})
# The same errors as text, as torch and Triton report them.
_LOST_WORDS = (
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "illegal memory access",
    "launch timed out",
    "context is destroyed",
    "device-side assert",
    "hardware stack error",
    "illegal instruction",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "external device",
    "gpu is lost",
    "fallen off the bus",
)


def is_device_lost(error: Exception, probe: Callable[[], object]) -> bool:
    """Whether the device is unusable after an exception in a step.

    Args:
        error: the exception.
        probe: an operation on the device that succeeds if the device is usable.
    """
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        text = str(error).lower()
        if getattr(error, "error_code", None) in _LOST_CODES or any(words in text for words in _LOST_WORDS):
            return True
    try:
        probe()
    except RuntimeError as failure:
        logger.error("the device does not answer: %s", failure)
        return True
    return False


def is_lost(error: Exception, device: torch.device) -> bool:
    """Like `is_device_lost`, with synchronizing this device as the probe."""
    return is_device_lost(
        error, partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    )


def _nothing() -> None:
    """The probe for a CPU, which is never lost."""


def failed_step(step_id: int, error: Exception, device: torch.device) -> FinishedStep:
    """The failed result of a step that raised. If memory ran out, the allocator's cache is emptied, so that
    later steps can use it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lines = str(error).splitlines() or [""]
    return FinishedStep.failed(step_id, f"{type(error).__name__}: {lines[0]}", is_last=is_lost(error, device))
