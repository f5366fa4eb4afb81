"""Tells whoever started this process that it is ready, in systemd's notification protocol (sd_notify(3)).

`pagewire serve` listens on a NOTIFY_SOCKET for each process it starts; so does systemd with Type=notify.
"""

from __future__ import annotations

import os
import socket


def notify_ready(status: str = "") -> None:
    """Sends READY=1 and a status line to $NOTIFY_SOCKET; does nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.sendto(f"READY=1\nSTATUS={status}\n".encode(), address)
