"""Waits for a worker and attaches to it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from engine.dispatch.control import HandshakeError, WorkerLink
from engine.dispatch.ring import RingError

logger = logging.getLogger(__name__)

# The time from one look to the next is this share of the time waited so far, within these limits, so that a
# worker that has started is soon attached, and one that stays away costs nothing.
_SHARE = 1 / 200
_LEAST_SECONDS, _MOST_SECONDS = 0.05, 0.25


async def attach(socket: Path) -> WorkerLink:
    """Tries until a worker that listens on `socket` answers. The handshake runs in a thread, as an answer may
    take its time.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        seconds = min(max(_SHARE * (loop.time() - began), _LEAST_SECONDS), _MOST_SECONDS)
        try:
            if socket.exists():
                return await asyncio.to_thread(WorkerLink.connect, socket)
        except (FileNotFoundError, ConnectionRefusedError):
            pass  # it was removed just now; or its worker was killed, or does not listen yet
        except (HandshakeError, RingError, OSError) as error:
            logger.warning("cannot attach to the worker at %s: %s", socket, error)
            seconds = _MOST_SECONDS
        await asyncio.sleep(seconds)
