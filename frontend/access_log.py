"""A line for every request, over either protocol: its id, what it asked for, how it ended, how long it took.

Nothing that a client may have sent in confidence is in it: no header but the request's id, no query, no body.
"""

from __future__ import annotations

import logging
import time

from pagewire.telemetry.logs import about

logger = logging.getLogger("frontend.access")


class AccessLog:
    """Writes the lines, or, if it is not enabled, none. Probes are only shown at level DEBUG."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    def ended(
        self, request_id: str, peer: str, what: str, outcome: str, began: float, *, probe: bool = False
    ) -> None:
        """Notes the end of a request that began at `time.perf_counter() == began`.

        Args:
            peer: the address of the other side.
            what: method and path, or the RPC's name.
            outcome: the status, or "client closed".
        """
        level = logging.DEBUG if probe else logging.INFO
        if not self._enabled or not logger.isEnabledFor(level):
            return
        milliseconds = (time.perf_counter() - began) * 1e3
        logger.log(
            level,
            "request %s: %s %s -> %s in %.1f ms",
            request_id,
            peer,
            _on_one_line(what),
            outcome,
            milliseconds,
            extra=about(
                request_id,
                peer=peer,
                what=_on_one_line(what),
                outcome=outcome,
                milliseconds=round(milliseconds, 1),
            ),
        )


def _on_one_line(text: str) -> str:
    """A path as it may be logged: a client must not be able to write lines of its own, nor endless ones."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 200 else shown[:199] + "…"
