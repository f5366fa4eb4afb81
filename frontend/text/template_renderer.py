"""Renders chat templates in processes of their own, within limits of time and memory.

A render holds one of a few processes, and usually lasts a fraction of a millisecond. One that exceeds a limit
ends its process, and nothing else: the next gets another process.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import select
import signal
import subprocess
import threading
import time
from typing import Any

from frontend.text import template_protocol as protocol
from frontend.text.template_protocol import PromptTooLong
from pagewire.base.errors import Overloaded, Unavailable
from pagewire.base.own_packages import python_command, python_path

CPU_SECONDS = 2.0
MAX_PROCESSES = 4
_MAX_IDLE = 2
_MAX_SLOW = 2
"""Renders that may take long at a time, so that threads and processes are left for the others."""
_SLOW_SECONDS = 0.5
_START_SECONDS = 60.0
_WALL_SECONDS = 20.0
"""Much more than CPU_SECONDS, because the machine may be busy."""
_PATIENCE_SECONDS = 0.05
"""A busy process is waited for this long before another one is started."""
_PIPE_BYTES = 1024**2
_INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")
"""The environment may hold keys, which no template needs."""


class TemplateFailed(Exception):
    """The template raised, which is how it refuses a conversation."""


class TemplateWrong(Exception):
    """The template does not compile."""


class TooMuch(Exception):
    """A limit on time or memory was exceeded; says which."""


_ERRORS = {
    protocol.TOO_LONG: PromptTooLong,
    protocol.TOO_DEEP: TooMuch,
    protocol.FAILED: TemplateFailed,
    protocol.WRONG: TemplateWrong,
}
_slow_renders = threading.BoundedSemaphore(_MAX_SLOW)


class RenderProcess:
    """One process. Not safe for use by several threads at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            python_command("frontend.text.template_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={
                **{name: os.environ[name] for name in _INHERITED if name in os.environ},
                **python_path(),
            },
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._started = False
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        for pipe in (self._requests, self._answers):
            try:
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            except PermissionError:
                break  # the user has many pipes; it works as well in smaller pieces

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def ask(self, source: str, variables: dict[str, Any] | None) -> str:
        """What a template writes; without variables, whether it compiles.

        Args:
            variables: data that JSON can say.

        Raises:
            TemplateWrong, TemplateFailed, PromptTooLong: it is wrong, refuses, or writes too much.
            TooMuch: it takes too much time or memory; the process is gone then. Or it calls itself endlessly.
            Overloaded: other renders take long already, and this one would too. The process is gone.
            Unavailable: the process does not start.
        """
        request: dict[str, Any] = {"source": source, "seconds": CPU_SECONDS}
        if variables is not None:
            request["variables"] = variables
        try:
            body = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except RecursionError as error:
            raise TemplateFailed(protocol.NESTED) from error
        try:
            self._wait_for_start()
            self._send(len(body).to_bytes(protocol.LENGTH_BYTES, "little") + body)
            kind, text = self._receive()
        except BaseException:
            self.close()  # whatever it answers now would be taken for the next answer
            raise
        if kind == protocol.TEXT:
            return text
        raise _ERRORS[kind](text)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._answers.close()

    def _wait_for_start(self) -> None:
        if not self._started:
            try:
                self._read(len(protocol.READY), time.monotonic() + _START_SECONDS)
            except TooMuch as error:
                raise Unavailable("the process that renders chat templates does not start") from error
            self._started = True

    def _send(self, message: bytes) -> None:
        left = memoryview(message)
        try:
            while left:
                left = left[self._requests.write(left) :]
        except BrokenPipeError as error:
            raise self._ended() from error

    def _receive(self) -> tuple[bytes, str]:
        deadline = time.monotonic() + _WALL_SECONDS
        if self._poll.poll(_SLOW_SECONDS * 1000):
            return self._read_answer(deadline)
        if not _slow_renders.acquire(blocking=False):
            raise Overloaded("other chat templates take long to render at the moment; try again later")
        try:
            return self._read_answer(deadline)
        finally:
            _slow_renders.release()

    def _read_answer(self, deadline: float) -> tuple[bytes, str]:
        kind = self._read(1, deadline)
        length = int.from_bytes(self._read(protocol.LENGTH_BYTES, deadline), "little")
        return kind, self._read(length, deadline).decode("utf-8", "surrogatepass")

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not self._poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TooMuch(f"more than {_WALL_SECONDS:g} s")
            part = self._answers.read(size - len(data))
            if not part:
                raise self._ended()
            data += part
        return bytes(data)

    def _ended(self) -> TooMuch:
        if self._process.wait() == -signal.SIGPROF:
            return TooMuch(f"more than {CPU_SECONDS:g} s of processor time")
        return TooMuch(f"more than {protocol.MEMORY_BYTES // 2**20} MiB of memory")


class TemplateRenderer:
    """Keeps a few processes. Blocking, and safe to use from several threads: not for an event loop."""

    def __init__(self) -> None:
        self._idle: list[RenderProcess] = []
        self._num_processes = 0
        self._changed = threading.Condition()

    def start(self) -> None:
        """Starts a process, if there is none, without waiting for it; it takes a tenth of a second."""
        with self._changed:
            if self._num_processes:
                return
            self._num_processes += 1
        self._give_back(RenderProcess())

    def compile(self, source: str) -> None:
        """Finds out whether a template compiles within the limits. Raises as `RenderProcess.ask`."""
        self._ask(source, None)

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """What the template writes. See `RenderProcess.ask`; Overloaded also if all processes are busy."""
        return self._ask(source, variables)

    def close(self) -> None:
        """Ends the processes that are idle."""
        with self._changed:
            while self._idle:
                self._idle.pop().close()
                self._num_processes -= 1

    def _ask(self, source: str, variables: dict[str, Any] | None) -> str:
        process = self._take()
        try:
            return process.ask(source, variables)
        finally:
            self._give_back(process)

    def _take(self) -> RenderProcess:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or not self._num_processes, _PATIENCE_SECONDS)
            if not self._changed.wait_for(
                lambda: self._idle or self._num_processes < MAX_PROCESSES, _WALL_SECONDS
            ):
                raise Overloaded("every process that renders chat templates is busy; try again later")
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.close()  # something ended it while it was idle
                self._num_processes -= 1
            self._num_processes += 1
        try:
            return RenderProcess()
        except BaseException:
            with self._changed:
                self._num_processes -= 1
            raise

    def _give_back(self, process: RenderProcess) -> None:
        with self._changed:
            if process.alive and len(self._idle) < _MAX_IDLE:
                self._idle.append(process)
            else:
                process.close()
                self._num_processes -= 1
            self._changed.notify()


RENDERER = TemplateRenderer()
"""Shared by all models of this process: its processes know nothing of one render in the next."""
atexit.register(RENDERER.close)
