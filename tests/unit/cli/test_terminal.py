"""`pagewire chat` at a terminal, as a person types: a pseudo-terminal before a server that echoes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

SECONDS = 30.0
_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
# `pagewire`, once its standard input is the terminal from which Ctrl-C comes.
_AT_TERMINAL = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("pagewire", run_name="__main__")
"""
CTRL_C, CTRL_D, CTRL_J, UP = "\x03", "\x04", "\n", "\x1b[A"


class Echo(inference_pb2_grpc.InferenceServiceServicer):
    """Says what was said last; "endless" without an end, until the client leaves."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.left = threading.Event()

    def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(id="echo")])

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        text = request.messages.messages[-1].content
        self.said.append(text)
        context.add_callback(self.left.set)
        yield pb.GenerateResponse(delta=pb.Delta(text=f"<{text}>", token_ids=[1]))
        while text == "endless" and context.is_active():
            time.sleep(0.01)
        yield pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_STOP))


@pytest.fixture
def echo() -> Iterator[tuple[Echo, str]]:
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


class Terminal:
    """A command at a pseudo-terminal of 24 lines by 100 columns."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        environment = {
            **os.environ,
            "PAGEWIRE_HOME": str(home),
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here answers where the cursor is
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, expected: str) -> str:
        """What is shown up to and including a text, without the terminal's own sequences."""
        deadline = time.monotonic() + SECONDS
        while expected not in _SEQUENCES.sub("", self._unread):
            left = deadline - time.monotonic()
            assert left > 0, f"{expected!r} is not in {self._unread!r}"
            if select.select([self._fd], [], [], left)[0]:
                try:
                    self._unread += os.read(self._fd, 65536).decode(errors="replace")
                except OSError as error:  # the terminal's other end is closed
                    raise AssertionError(f"{expected!r} is not in {self._unread!r}") from error
        shown, _, rest = _SEQUENCES.sub("", self._unread).partition(expected)
        self._unread = rest
        return shown + expected

    def wait(self) -> int:
        """The exit status. What is written meanwhile is read, lest the process wait for a reader."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self._fd], [], [], 0.02)[0]:
                try:
                    os.read(self._fd, 65536)
                except OSError:
                    break
        return self.process.wait(SECONDS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._fd)


def test_a_person_types_stops_and_comes_back(echo: tuple[Echo, str], tmp_path: Path) -> None:
    servicer, address = echo
    with Terminal("chat", "--url", address, home=tmp_path) as terminal:
        terminal.until("Ctrl-D leaves")
        terminal.type(f"one{CTRL_J}two\r")
        terminal.until("<one\r\ntwo>")
        servicer.left.clear()
        terminal.type("endless\r")
        terminal.until("<endless>")
        terminal.type(CTRL_C)
        terminal.until("[stopped]")
        terminal.until(">")
        assert servicer.left.wait(SECONDS), "the request goes on"
        terminal.type("/reg\t")
        terminal.until("/regenerate")
        terminal.type("\r")
        terminal.until("<endless>")
        terminal.type(CTRL_C)
        terminal.until("[stopped]")
        terminal.until(">")
        terminal.type(f"half a question{CTRL_C}")
        terminal.until("Ctrl-D leaves")
        terminal.type("/stats\r")
        terminal.until("time to first token")
        terminal.type("last words\r")
        terminal.until("<last words>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    assert servicer.said == ["one\ntwo", "endless", "endless", "last words"]
    history = tmp_path / "chat_history"
    assert history.stat().st_mode & 0o077 == 0, "others can read what was typed"
    with Terminal("chat", "--url", address, home=tmp_path) as terminal:
        terminal.until("Ctrl-D leaves")
        terminal.type(f"{UP}\r")
        terminal.until("<last words>")
        terminal.type("/exit\r")
        assert terminal.wait() == 0
