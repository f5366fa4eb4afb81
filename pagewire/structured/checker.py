"""Whether a constraint can be served, found out where it can do no harm."""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from collections import OrderedDict
from dataclasses import asdict
from typing import Any

from pagewire.base.errors import InvalidRequest, Unavailable
from pagewire.base.own_packages import python_command, python_path
from pagewire.structured.check_process import Verdict
from pagewire.wire.sampling_params import StructuredOutput

COMPILE_SECONDS = 5.0
_START_SECONDS = 60.0
_SLACK_SECONDS = 5.0
_MAX_VERDICTS = 256


class ConstraintChecker:
    """Tries constraints in a process of its own, which is started at the first and may die of any.

    Blocking, and safe to call from several threads, which then wait for each other: not for an event loop.
    Verdicts are kept, so that a constraint in use is tried once.

    Args:
        vocabulary: model_dir, vocab_size and eos_token_ids, to try more than the grammar itself; see
            `vocabulary.Vocabulary.load`.
        seconds: how long compiling a constraint may take.
    """

    def __init__(self, vocabulary: dict[str, Any] | None = None, *, seconds: float = COMPILE_SECONDS) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._verdicts: OrderedDict[StructuredOutput, Verdict] = OrderedDict()

    def check(self, structured: StructuredOutput) -> Verdict:
        """What the constraint compiles to.

        Raises:
            InvalidRequest: it is wrong, not supported, or too much; the message says what is.
            Unavailable: the process that tries it could not be started.
        """
        with self._lock:
            verdict = self._verdicts.get(structured)
            if verdict is None:
                verdict = self._verdicts[structured] = self._try(structured)
            self._verdicts.move_to_end(structured)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if verdict.error:
            raise InvalidRequest(verdict.error, param=verdict.param)
        return verdict

    def close(self) -> None:
        """Ends the process, and with Unavailable whatever is being checked. Nothing is checked after it."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def _try(self, structured: StructuredOutput) -> Verdict:
        if self._closed:
            raise Unavailable("constraints are not checked any more; the process ends")
        if self._process is None or self._process.poll() is not None:
            self._start()
        given = {name: value for name, value in asdict(structured).items() if value not in (None, False, ())}
        message = json.dumps({"seconds": self._seconds, "structured": given})
        try:
            answer = self._ask(message.encode() + b"\n", self._seconds + _SLACK_SECONDS)
        except (OSError, TimeoutError) as error:
            self._end()
            raise Unavailable(f"the process that checks constraints was lost: {error}; try again") from error
        return Verdict(**json.loads(answer))

    def _start(self) -> None:
        self._end()
        arguments = [] if self._vocabulary is None else [json.dumps(self._vocabulary)]
        self._process = subprocess.Popen(
            [*python_command("pagewire.structured.check_process"), *arguments],
            env={**os.environ, **python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._ask(b"", _START_SECONDS)
        except (OSError, TimeoutError) as error:
            self._end()
            raise Unavailable(f"the process that checks constraints does not start: {error}") from error

    def _ask(self, message: bytes, seconds: float) -> bytes:
        """Sends a line, if it is one, and returns the next line that comes.

        Raises:
            OSError: the process is gone.
            TimeoutError: it does not answer.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if message:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        deadline, answer, fd = time.monotonic() + seconds, b"", self._process.stdout.fileno()
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise TimeoutError(f"no answer within {seconds:g} s")
            part = os.read(fd, 1 << 16)
            if not part:
                raise OSError("it ended")
            answer += part
        return answer

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()
