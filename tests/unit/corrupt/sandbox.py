"""Loads model files in a forked process with limits on memory and time, and says how that ended."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 20
# Address space beyond what the process has when it is forked; much more than is ever touched, because torch
# reserves memory that it does not use.
ADDRESS_SPACE = 3 * 2**30
GROWTH = 2**30
LONGEST_MESSAGE = 1000
_LOADED, _REFUSED, _FOUND = 0, 10, 11

Load = Callable[[Path], Any]


def load_engine(directory: Path) -> None:
    """As engine-worker does, on the CPU."""
    from engine.config import WorkerConfig
    from engine.worker.build import build_worker

    config = WorkerConfig(
        model=str(directory), socket=Path("unused"), device="cpu", kv_cache_memory=2**26, max_num_seqs=4
    )
    build_worker(config)


def load_streamed(directory: Path) -> None:
    """As engine-worker does for a GPU, though onto the CPU."""
    import torch

    from engine.loader import weights

    streamed, mapped = weights._load_streamed, weights._load_mapped
    weights._load_mapped = lambda targets, checkpoint: streamed(targets, checkpoint, torch.device("cpu"))
    try:
        load_engine(directory)
    finally:
        weights._load_mapped = mapped


def load_text(directory: Path) -> None:
    """As the frontend does, and the scheduler for constrained requests."""
    from frontend.served_model import ServedModel
    from pagewire.hub import resolve_model
    from pagewire.structured.vocabulary import Vocabulary

    model = ServedModel.load(resolve_model(str(directory)), ("m",), None)
    ids = model.tokenizer.encode("The quick brown fox isn't 12345 years old 北京")
    model.tokenizer.token_bytes(ids[0] if ids else 0)
    Vocabulary.load(directory, 512, (1,))


def load_gguf(path: Path) -> None:
    """Converts, and loads what came of it."""
    from pagewire.base.cache_home import cache_home
    from pagewire.hub import resolve_model

    home = path.parent / "home"
    home.mkdir(exist_ok=True)
    compiled = home / "native"
    if not compiled.is_symlink():
        compiled.symlink_to(cache_home() / "native")  # once for all
    os.environ["PAGEWIRE_HOME"] = str(home)
    directory = resolve_model(str(path))
    load_engine(directory)
    load_text(directory)


def warm_up() -> None:
    """Imports everything, once, so that a case costs a fork and not an import. Runs nothing: threads would
    not outlive the fork."""
    for module in (
        *("engine.worker.build", "engine.cpu.runner", "engine.models.decoder", "frontend.served_model"),
        *("pagewire.hub.gguf.convert", "pagewire.structured.vocabulary"),
    ):
        import_module(module)


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        status: "loaded", "refused", "found" (an exception that it should not have been), "memory", or the
            name of a signal.
        report: the message or a traceback.
        seconds: it took.
        growth: bytes of memory it needed beyond what the parent ever had.
    """

    status: str
    report: str
    seconds: float
    growth: int


def run_case(loads: Sequence[Load], path: Path, log: Path) -> Outcome:
    """Loads the files in a child process, whose output goes to `log`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(loads, path, writer, log)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read().decode(errors="replace")
    _, status, usage = os.wait4(pid, 0)
    seconds, growth = time.monotonic() - started, max(0, usage.ru_maxrss * 1024 - before)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Outcome(name, log.read_text(errors="replace")[-1500:], seconds, growth)
    if growth > GROWTH:
        return Outcome("memory", report, seconds, growth)
    statuses = {_LOADED: "loaded", _REFUSED: "refused"}
    return Outcome(statuses.get(os.waitstatus_to_exitcode(status), "found"), report, seconds, growth)


def _child(loads: Sequence[Load], path: Path, writer: int, log: Path) -> None:
    """Never returns."""
    code = _FOUND
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        report = ""
        try:
            for load in loads:
                load(path)
            code = _LOADED
        except BaseException as error:
            code, report = _judge(error, path)
        os.write(writer, report.encode(errors="replace")[:60_000])
    finally:
        os._exit(code)


def _judge(error: BaseException, path: Path) -> tuple[int, str]:
    from pagewire.base.errors import ConfigError

    if not isinstance(error, ConfigError):
        return _FOUND, traceback.format_exc()
    message = error.message
    place = path if path.is_dir() else path.parent  # what a GGUF file is converted to lies beside it here
    wrong = [
        *(["names no file"] if str(place) not in message else []),
        *(["is not one printable line"] if not message.isprintable() else []),
        *([f"has {len(message)} characters"] if len(message) > LONGEST_MESSAGE else []),
    ]
    if wrong:
        return _FOUND, f"ConfigError whose message {' and '.join(wrong)}: {message[:500]!r}"
    return _REFUSED, message
