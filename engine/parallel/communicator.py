"""What the ranks of a group send each other while they compute.

The ranks meet again whenever their scheduler attaches, each time in a new process group: the death of one
takes the group with it, and the others keep their weights for the next one.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Untyped: torch's own annotations leave out what is used of it here.
_c10d: Any = dist

logger = logging.getLogger(__name__)

# How long a rank waits for the others at a meeting.
JOIN_SECONDS = 30.0


class Communicator:
    """This rank's way to the others of its group. Outside of a meeting, as while a worker measures how much
    memory its steps take, a rank is alone: sums are its own, and what is gathered is its own part repeated.

    Used by one thread; another one breaks what it waits for once the scheduler is gone.

    Args:
        rank, size: its place, and how many there are.
        device: where the tensors are. gloo serves CPUs, NCCL GPUs.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self._device = device
        self._group: Any = None
        self._connections: list[socket.socket] = []
        self._watch: _Watch | None = None

    def join(self, rendezvous: str) -> None:
        """Meets the others, who come to the same file, which is new for each meeting.

        Raises:
            OSError: not all of them came within JOIN_SECONDS.
        """
        self.leave()
        store = _c10d.FileStore(rendezvous, self.size)
        store.set_timeout(timedelta(seconds=JOIN_SECONDS))
        try:
            if self._device.type == "cuda":
                self._group = self._meet_over_nccl(store)
            else:
                before = _open_sockets()
                self._group = self._meet_over_gloo(store)
                self._connections = _connections(_open_sockets() - before)
            self.all_reduce(torch.zeros(1, device=self._device))
        except RuntimeError as error:
            self.leave()
            raise OSError(f"rank {self.rank} did not meet the others: {error}") from error
        logger.info("rank %d has met the other %d", self.rank, self.size - 1)

    def _meet_over_gloo(self, store: Any) -> Any:
        options = _c10d.ProcessGroupGloo._Options()
        # All ranks are on this host, and nobody else is to reach them.
        options._devices = [_c10d.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        return _c10d.ProcessGroupGloo(store, self.rank, self.size, options)

    def _meet_over_nccl(self, store: Any) -> Any:
        torch.cuda.set_device(self._device)
        return _c10d.ProcessGroupNCCL(store, self.rank, self.size)

    def watch(self, control_fd: int) -> None:
        """From now on, breaks whatever this rank waits for once `control_fd` is readable: the scheduler has
        gone, as it does when any rank is lost.
        """
        self._watch = _Watch(control_fd, self._break)

    def _break(self) -> None:
        """Ends every wait for other ranks with an error, though they may live and hang. From any thread."""
        # gloo has no way to do this by itself.
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()

    def leave(self) -> None:
        """Forgets the process group; the others notice."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._break()
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._group = None

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's partial result, in place; the same bytes on every rank.

        Raises:
            RuntimeError: another rank is lost.
        """
        if self._group is not None:
            self._group.allreduce([partial]).wait()
        return partial

    def all_gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part, in rank order; all of one shape. Every rank gets the same bytes.

        Raises:
            RuntimeError: another rank is lost.
        """
        if self._group is None:
            return [part] * self.size
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._group.allgather([parts], [part.contiguous()]).wait()
        return parts


class _Watch:
    """A thread that waits for a descriptor to become readable, and then calls once."""

    def __init__(self, fd: int, call: Callable[[], None]) -> None:
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._fd, self._call = fd, call
        self._thread = threading.Thread(target=self._run, name="group watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLRDHUP)
        poll.register(self._stop_fd, select.POLLIN)
        if self._stop_fd not in dict(poll.poll()):
            self._call()

    def close(self) -> None:
        """Ends it."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)


def _open_sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself is closed by now
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def _connections(descriptors: set[int]) -> list[socket.socket]:
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
