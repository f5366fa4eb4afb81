"""The sockets of this process that listen on a port, and those of its clients.

gRPC can close its listening sockets only together with everything that they took in, and a call that comes
meanwhile ends as cancelled. To hand a port over to another process without that, its sockets are found here.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager


def stop_listening(port: int) -> None:
    """Ends the listening on a TCP port: from now on other processes that share it get all connections."""
    for descriptor in _sockets():
        with _borrowed(descriptor) as each:
            if each is not None and _is_on(each, port) and _listens(each):
                each.shutdown(socket.SHUT_RDWR)


def num_connections(port: int) -> int:
    """Connections that were accepted on a TCP port and are still open."""
    count = 0
    for descriptor in _sockets():
        with _borrowed(descriptor) as each:
            count += each is not None and _is_on(each, port) and _is_connected(each)
    return count


def _sockets() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket | None]:
    """The socket behind a descriptor, None if there is none any more or it is something else."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        copy = os.dup(descriptor) if is_socket else None
    except OSError:  # closed since the directory was listed
        copy = None
    if copy is None:
        yield None
        return
    with socket.socket(fileno=copy) as each:
        yield each


def _is_on(each: socket.socket, port: int) -> bool:
    return (
        each.family in (socket.AF_INET, socket.AF_INET6)
        and each.type == socket.SOCK_STREAM
        and bool(each.getsockname()[1] == port)
    )


def _listens(each: socket.socket) -> bool:
    return each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _is_connected(each: socket.socket) -> bool:
    try:
        each.getpeername()
    except OSError:  # it listens, or did
        return False
    return True
