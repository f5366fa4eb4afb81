"""Waits for a worker, or for all ranks of a model, and attaches to them."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from contextlib import closing
from functools import partial
from pathlib import Path

from engine.dispatch.control import (
    HANDSHAKE_SECONDS,
    MAX_STEPS_IN_FLIGHT,
    HandshakeError,
    WorkerSilent,
    is_warm,
    rank_socket,
)
from engine.dispatch.link import OtherWorldSize, WorkerLink
from engine.dispatch.peer import PeerProcess
from engine.dispatch.ring import RingError
from scheduler.workers.watchdog import FIRST_STEPS_FACTOR, STACKS_SECONDS

logger = logging.getLogger(__name__)

# The polling interval is this share of the time waited so far, within these limits: a worker that starts is
# attached soon, and one that does not start costs almost nothing.
_SHARE = 1 / 200
_LEAST_SECONDS, _MOST_SECONDS = 0.05, 0.25


async def attach(socket: Path, step_timeout: float = math.inf, *, one_hangs: bool = False) -> WorkerLink:
    """Tries until the worker that listens on `socket`, and the other ranks of its model, answer. The
    handshake runs in a thread, because the answer may take long: a worker first finishes the previous
    scheduler's step.

    Args:
        socket: where workers listen; see `rank_socket`.
        step_timeout: seconds that a step may take. A worker counts as hung and is killed if it accepts
            connections but does not answer for as long as the previous scheduler's steps may take.
        one_hangs: one of several workers hangs and it is not known which. The scheduler has detached from
            all of them; those that do not hang answer soon.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    world_size = 1
    with closing(_Silence()) as silence:
        while True:
            seconds = min(max(_SHARE * (loop.time() - began), _LEAST_SECONDS), _MOST_SECONDS)
            try:
                sockets = [rank_socket(socket, rank) for rank in range(world_size)]
                if all(each.exists() for each in sockets):
                    patience = max(patience_with(each, step_timeout) for each in sockets)
                    if one_hangs:
                        patience = min(patience, HANDSHAKE_SECONDS)
                    connect = partial(WorkerLink.connect, socket, patience, world_size=world_size)
                    return await asyncio.to_thread(connect)
            except OtherWorldSize as other:
                world_size, seconds = other.world_size, 0.0
            except (FileNotFoundError, ConnectionRefusedError):
                pass  # the socket was just removed, or its worker was killed or does not listen yet
            except (HandshakeError, RingError, OSError) as error:
                logger.warning("cannot attach to the worker at %s: %s", socket, error)
                seconds = _MOST_SECONDS
                if isinstance(error, WorkerSilent):
                    who = "the worker" if world_size == 1 else f"the worker of rank {error.rank}"
                    silence.kept_by(error.process, patience, who)
                if isinstance(error, WorkerSilent | TimeoutError):
                    await silence.end_if_longer_than(patience)
            await asyncio.sleep(seconds)


def patience_with(socket: Path, step_timeout: float) -> float:
    """Seconds that the worker on `socket` may need for steps that the previous scheduler left in flight."""
    return step_timeout * (MAX_STEPS_IN_FLIGHT if is_warm(socket) else FIRST_STEPS_FACTOR)


class _Silence:
    """How long a worker has accepted connections without answering. The watchdog cannot notice that such a
    worker hangs, because there are no steps before a scheduler is attached.
    """

    def __init__(self) -> None:
        self._process: PeerProcess | None = None
        self._name = ""
        self._began = 0.0

    def kept_by(self, process: PeerProcess, patience: float, name: str) -> None:
        """Records that this worker did not answer for `patience` seconds, or HANDSHAKE_SECONDS if that is
        less. Unless it was silent before, its silence began then. Takes over `process`.
        """
        if self._process is not None and self._process.pid == process.pid:
            process.close()
            return
        self.close()
        self._process, self._name = process, name
        self._began = asyncio.get_running_loop().time() - min(patience, HANDSHAKE_SECONDS)

    async def end_if_longer_than(self, patience: float) -> None:
        """Kills the worker if it has been silent for `patience` seconds; asks it for its stacks first."""
        process = self._process
        seconds = asyncio.get_running_loop().time() - self._began
        if process is None or seconds < patience:
            return
        who = f"{self._name} (pid {process.pid})"
        logger.error("%s hangs: it has answered no scheduler for %.1f s, and is killed", who, seconds)
        try:
            process.signal(signal.SIGUSR1)
            await asyncio.sleep(STACKS_SECONDS)
            process.signal(signal.SIGKILL)
        except ProcessLookupError:
            logger.info("%s has ended by itself", who)
        except OSError as error:
            logger.error("%s cannot be killed from here (%s); end it by hand", who, error)
        self.close()

    def close(self) -> None:
        """Releases the handle of the worker's process."""
        if self._process is not None:
            self._process.close()
            self._process = None
