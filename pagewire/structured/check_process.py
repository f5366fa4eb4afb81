"""The process in which constraints are tried before the real thing compiles them.

A grammar of thirty kilobytes can overflow the compiler's stack, and a schema of thirty bytes can keep it busy
for minutes. So each constraint is first compiled in a fork of this process, which may die of it. What came of
it goes back as a line of JSON; see `Verdict`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from pagewire.base.errors import InvalidRequest
from pagewire.structured.translate import complaint, parser_limits, to_grammar
from pagewire.structured.vocabulary import Vocabulary
from pagewire.wire.sampling_params import StructuredOutput

_STACK_BYTES = 4 << 20  # a quarter of what the threads have that compile the constraint in earnest
_MAX_GROWTH_BYTES = 256 << 20
_PAGE = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a trial.

    Attributes:
        grammar: as llguidance takes it; empty if there is an error.
        num_bytes: memory that the compiled constraint took.
        error: what is wrong with the constraint, for people.
        param: the field at fault.
    """

    grammar: str = ""
    num_bytes: int = 0
    error: str = ""
    param: str | None = None


def try_constraint(structured: StructuredOutput, vocabulary: Vocabulary | None) -> Verdict:
    """Compiles a constraint and, given a vocabulary, finds what its text may begin with."""
    before = _resident_bytes()
    try:
        grammar = to_grammar(structured)
        if vocabulary is not None:
            matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=parser_limits())
            matcher.compute_bitmask()
            if matcher.is_error():
                raise complaint(structured, matcher.get_error())
    except InvalidRequest as error:
        return Verdict(error=error.message, param=error.param)
    return Verdict(grammar, max(_resident_bytes() - before, 0))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _data_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[5]) * _PAGE


def _try_in_fork(line: bytes, vocabulary: Vocabulary | None) -> bytes:
    """The verdict on a line {"seconds", "structured"}; of a trial that died, what it died of."""
    message = json.loads(line)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _run_trial(message, vocabulary, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return answer
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    why = (
        f"takes more than {message['seconds']:g} s to compile; make it simpler"
        if timed_out
        else "is too large or too deeply nested to compile; make it simpler"
    )
    return _encode(Verdict(error=f"the structured output's constraint {why}", param="structured_output"))


def _run_trial(message: dict[str, Any], vocabulary: Vocabulary | None, write_end: int) -> None:
    """Runs in the fork and ends it. The kernel's own alarm ends it when it takes too long."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, message["seconds"])
        for limit, size in (
            (resource.RLIMIT_STACK, _STACK_BYTES),
            (resource.RLIMIT_DATA, _data_bytes() + _MAX_GROWTH_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (size, size))
        answer = _encode(try_constraint(StructuredOutput(**message["structured"]), vocabulary))
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    except MemoryError:
        os._exit(1)
    finally:
        traceback.print_exc()
        os._exit(1)


def _encode(verdict: Verdict) -> bytes:
    return json.dumps(asdict(verdict)).encode()


def main() -> None:
    """Serves lines from standard input until it ends. Arguments: none, or what Vocabulary.load takes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to act on
    vocabulary = None
    if len(sys.argv) > 1:
        settings = json.loads(sys.argv[1])
        vocabulary = Vocabulary.load(
            Path(settings["model_dir"]), settings["vocab_size"], tuple(settings["eos_token_ids"])
        )
    answers = sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(_try_in_fork(line, vocabulary) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
