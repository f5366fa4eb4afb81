"""Memory of a GPU that other processes on the host can write to, by CUDA's driver (CUDA IPC).

The memory is not of torch's allocator: a handle means a whole allocation, and this one stays as long as the
process does.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

logger = logging.getLogger(__name__)

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class PeerMemory:
    """An allocation on the current device, and those of others that were opened. Used by one thread, in which
    torch has made the device current.

    Attributes:
        address: of this process's own.

    Raises:
        OSError: the driver refuses; the message says what.
    """

    def __init__(self, num_bytes: int) -> None:
        self._driver: Any = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self.address = address.value
        self._num_bytes = num_bytes
        self._opened: list[int] = []

    def handle(self) -> bytes:
        """What another process opens."""
        handle = _Handle()
        self._check("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """The address here of another process's memory, until `close_opened`."""
        copied = _Handle()
        ctypes.memmove(ctypes.byref(copied), handle, HANDLE_BYTES)
        address = ctypes.c_uint64()
        self._check("cuIpcOpenMemHandle_v2", ctypes.byref(address), copied, ctypes.c_uint(_LAZY_PEER_ACCESS))
        self._opened.append(address.value)
        return address.value

    def close_opened(self) -> None:
        """Lets go of what was opened. Of a process that died the driver may have done so already."""
        opened, self._opened = self._opened, []
        for address in opened:
            try:
                self._check("cuIpcCloseMemHandle", ctypes.c_uint64(address))
            except OSError as error:
                logger.warning("memory of another rank is not closed: %s", error)

    def fill(self, bits: int) -> None:
        """Sets every 16-bit number of this process's own memory, in order with nothing else."""
        count = ctypes.c_size_t(self._num_bytes // 2)
        self._check("cuMemsetD16_v2", ctypes.c_uint64(self.address), ctypes.c_ushort(bits), count)

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            words = text.value.decode() if text.value else "unknown error"
            raise OSError(f"{function}: {words} ({status})")
