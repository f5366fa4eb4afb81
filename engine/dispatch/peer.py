"""The process at the other end of a Unix socket, to be signalled without hitting any other."""

from __future__ import annotations

import os
import signal
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class PeerProcess:
    """Who listened on the socket that this process connected to, as the kernel knows it: a process's own word
    for its id means nothing in another PID namespace. Held by a pidfd, so that the id, once free, cannot mean
    somebody else. Owns the pidfd.

    To be made while the peer is known to live: before it answers on the socket.

    Attributes:
        pid: its id as seen from here; 0 if it cannot be seen from this PID namespace.
    """

    def __init__(self, sock: socket.socket) -> None:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid = int(_CREDENTIALS.unpack(credentials)[0])
        self._pidfd = -1
        if self.pid not in (0, os.getpid()):
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError:  # it has died, or a sandbox forbids it; `signal` says so
                self.pid = 0

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal.

        Raises:
            OSError: this process may not, or cannot see it; or it has ended. Or it is this process itself,
                which nobody means.
        """
        if self._pidfd < 0:
            raise PermissionError("it is not a process that can be signalled from here")
        signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Lets go of it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
