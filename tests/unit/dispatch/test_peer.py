"""Signals to the process at the other end of a socket, and to no other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.dispatch.peer import PeerProcess

LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
listener.accept()[0].recv(1)
"""


def test_it_is_whoever_listens_and_an_end_is_told_from_a_refusal(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    command = [sys.executable, "-c", LISTEN, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as listener, socket.socket(socket.AF_UNIX) as sock:
        assert listener.stdout is not None
        listener.stdout.readline()
        sock.connect(path)
        peer = PeerProcess(sock)
        assert peer.pid == listener.pid
        peer.signal(signal.SIGKILL)
        assert listener.wait(5) == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            peer.signal(signal.SIGKILL)
        before = len(os.listdir("/proc/self/fd"))
        peer.close()
        peer.close()
        assert len(os.listdir("/proc/self/fd")) == before - 1
    with pytest.raises(PermissionError):
        peer.signal(signal.SIGKILL)


def test_a_process_never_signals_itself() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs, pytest.raises(PermissionError):
        PeerProcess(ours).signal(signal.SIGKILL)
