"""The connections that gloo has made, which it offers no way to break."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress


def open_sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself is closed by now
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def connections(descriptors: set[int]) -> list[socket.socket]:
    """Those of the sockets that are connected, as objects of our own, which mean the same connections however
    long the library keeps its own open.
    """
    found = []
    for descriptor in sorted(descriptors):
        connection = socket.socket(fileno=os.dup(descriptor))
        try:
            connection.getpeername()
            found.append(connection)
        except OSError:  # it listens
            connection.close()
    return found


def shut_down(sockets: Iterable[socket.socket]) -> None:
    """Ends what anybody waits for on them."""
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
