"""Tells errors that end a step from errors that end everything on a device.

After some CUDA errors ("sticky" ones) every further call in the process fails, until it is started anew;
after others, such as memory that ran out, the next step is computed as if nothing had happened.
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
# The same in words, as torch and Triton report them.
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
    """Whether nothing can be computed on the device any more, after an exception in a step.

    Args:
        error: the exception.
        probe: does something on the device that succeeds wherever computing is possible.
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
    """The same for a step on this device."""
    return is_device_lost(
        error, partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    )


def _nothing() -> None:
    """A CPU always answers."""


def failed_step(step_id: int, error: Exception, device: torch.device) -> FinishedStep:
    """What became of a step that raised. If memory ran out, the allocator's caches are emptied, so that the
    steps to come find all there is.
    """
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lines = str(error).splitlines() or [""]
    return FinishedStep.failed(step_id, f"{type(error).__name__}: {lines[0]}", is_last=is_lost(error, device))
