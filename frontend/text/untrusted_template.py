"""Renders a template that came with a request, in a process of its own with little time and memory.

Jinja's sandbox keeps a template from reaching anything, but not from looping for ever or filling the memory.
A process can be stopped. Starting one takes about a tenth of a second, for requests with a template only.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from frontend.text.template_environment import PromptTooLong, compile_template, render_template
from pagewire.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 128 * 1024
CPU_SECONDS = 2
MEMORY_BYTES = 512 * 1024 * 1024
_WALL_SECONDS = 20.0
"""Much more than CPU_SECONDS, because the machine may be busy."""


def render_untrusted(source: str, variables: dict[str, Any]) -> str:
    """What the template writes. Blocks; not for the event loop.

    Args:
        variables: data that JSON can say.

    Raises:
        InvalidRequest: the template is wrong, refuses the conversation, or takes too much time or memory.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            f"chat_template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are taken",
            param="chat_template",
        )
    request = json.dumps({"source": source, "variables": variables})
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "frontend.text.untrusted_template"],
            input=request.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_much() from error
    if ended.returncode != 0:
        raise _too_much()
    answer = json.loads(ended.stdout)
    if "error" in answer:
        raise InvalidRequest(f"the request's chat_template failed: {answer['error']}", param="chat_template")
    return str(answer["text"])


def _too_much() -> InvalidRequest:
    return InvalidRequest(
        f"the request's chat_template took more than {CPU_SECONDS} s of processor time or "
        f"{MEMORY_BYTES // 2**20} MiB of memory",
        param="chat_template",
    )


def _main() -> None:
    """The process: a request in, an answer out."""
    request = json.load(sys.stdin)
    for kind, limit in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    try:
        answer = {"text": render_template(compile_template(request["source"]), request["variables"])}
    except (MemoryError, PromptTooLong):
        sys.exit(1)
    except Exception as error:  # what any expression of a template can raise
        answer = {"error": str(error)[:1000] or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
