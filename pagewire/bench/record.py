"""What a benchmark's result is written down with: machine, versions, commit and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("pagewire", "torch", "triton", "numpy", "grpcio", "protobuf", "uvloop", "transformers")
_COMMIT_VARIABLE = "GIT_COMMIT"
LINE_WIDTH = 110
"""Characters that a list or object of several parts may have on one line of a record."""


def describe_run(benchmark: str, program: str = "pagewire") -> dict[str, Any]:
    """Everything about this run of `program` but its results."""
    return {
        "benchmark": benchmark,
        "command": " ".join([program, *map(shlex.quote, sys.argv[1:])]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the file, whole or not at all; a longer record may take its place later.

    Records are kept in the repository, so `record` is a summary: medians and counts, not every sample.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(compact_json(record) + "\n", encoding="utf-8")
    partial.replace(path)


def compact_json(value: Any, indent: int = 0) -> str:
    """JSON in few lines: a list or object has one line if it fits in LINE_WIDTH or holds no other, but each
    text of a longer list has its own."""
    line = json.dumps(value, default=str)
    if not isinstance(value, (dict, list, tuple)) or indent + len(line) <= LINE_WIDTH:
        return line
    members = list(value.values()) if isinstance(value, dict) else list(value)
    is_text = isinstance(value, list) and any(isinstance(member, str) for member in members)
    if not is_text and not any(isinstance(member, (dict, list, tuple)) for member in members):
        return line
    names = [f"{json.dumps(str(name))}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    inner, outer = " " * (indent + 1), " " * indent
    parts = [
        f"{inner}{name}{compact_json(member, indent + 1)}"
        for name, member in zip(names, members, strict=True)
    ]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([begin, ",\n".join(parts), f"{outer}{end}"])


def _machine() -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each GPU, as nvidia-smi knows them; none where there is no such command."""
    fields = ("name", "memory.total", "driver_version")
    output = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [
        dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))
        for line in output.splitlines()
    ]


def _commit() -> str:
    """The commit of the source this runs from, "-dirty" if changed; for a copy without its repository, what
    $GIT_COMMIT says; "" where neither is known."""
    directory = str(Path(__file__).parent)
    if not _output("git", "-C", directory, "ls-files", Path(__file__).name):
        return os.environ.get(_COMMIT_VARIABLE, "")
    dirty = _output("git", "-C", directory, "status", "--porcelain", "--untracked-files=no")
    return _output("git", "-C", directory, "rev-parse", "HEAD") + ("-dirty" if dirty else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; "" if it fails or is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
