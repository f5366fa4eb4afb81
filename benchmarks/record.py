"""What every benchmark's result is written down with: machine, versions, commit and command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "grpcio", "protobuf", "uvloop", "numpy", "transformers")


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=documentation)
    result.add_argument("--json", type=Path, help="write the results to this file")
    return result


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Prints the results and, if a path is given, writes them with all that is needed to repeat them."""
    print(json.dumps(results, indent=2))
    if path is None:
        return
    record = {
        "command": f"python -m {_module()} {' '.join(sys.argv[1:])}".strip(),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _module() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _machine() -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return ""


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip()
