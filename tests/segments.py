"""Shared memory that processes have left behind."""

from __future__ import annotations

import os
from collections.abc import Iterable


def segments_of(pids: Iterable[int]) -> list[str]:
    """Names in /dev/shm of segments that these processes made; other services may run beside them."""
    prefixes = tuple(f"pagewire-{pid}-" for pid in pids)
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefixes)]
