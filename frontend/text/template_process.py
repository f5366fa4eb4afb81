"""The process in which chat templates are compiled and rendered.

Jinja's sandbox keeps a template from reaching anything, but not from looping for ever or filling the memory:
`'x' * 10**10` does the latter when it is compiled. A process can be limited, and stopped by the kernel in the
middle of any instruction.

See `template_protocol` for what it is told and tells, `template_renderer` for the other side.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2

from frontend.text.template_environment import compile_template, render_template
from frontend.text.template_protocol import (
    FAILED,
    LENGTH_BYTES,
    MEMORY_BYTES,
    NESTED,
    READY,
    TEXT,
    TOO_DEEP,
    TOO_LONG,
    WRONG,
    PromptTooLong,
)

_MAX_REASON = 1000

_compiled = lru_cache(maxsize=8)(compile_template)


def _answer(request: dict[str, Any]) -> tuple[bytes, str]:
    try:
        template = _compiled(request["source"])
    except RecursionError:
        return WRONG, "it is nested too deeply"
    except MemoryError:
        raise
    except Exception as error:  # folding constants runs the template's own expressions
        return WRONG, _reason(error)
    if "variables" not in request:
        return TEXT, ""
    try:
        return TEXT, render_template(template, request["variables"])
    except PromptTooLong as error:
        return TOO_LONG, str(error)
    except RecursionError:
        return TOO_DEEP, "more calls within calls than there may be"
    except MemoryError:
        raise
    except Exception as error:  # what any expression of a template can raise
        return FAILED, _reason(error)


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, jinja2.TemplateError) else str(error)
    return (text or type(error).__name__)[:_MAX_REASON]


def _limit() -> None:
    for kind, size in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (size, size))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to act on
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it is doing


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while length := requests.read(LENGTH_BYTES):
        body = requests.read(int.from_bytes(length, "little"))
        try:
            request = json.loads(body)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            kind, text = _answer(request)
        except RecursionError:
            kind, text = FAILED, NESTED
        data = text.encode("utf-8", "surrogatepass")
        answers.write(kind + len(data).to_bytes(LENGTH_BYTES, "little") + data)
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answers requests from standard input until it ends, or until one takes too much."""
    answers = sys.stdout.buffer
    _limit()
    answers.write(READY)
    answers.flush()
    try:
        _serve(sys.stdin.buffer, answers)
    except MemoryError:
        sys.exit(1)


if __name__ == "__main__":
    main()
