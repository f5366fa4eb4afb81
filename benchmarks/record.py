"""What every benchmark's result is written down with: machine, versions, commit and command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pagewire.bench.record import compact_json, describe_run, write_record


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=documentation)
    result.add_argument("--json", type=Path, help="write the results to this file")
    return result


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Prints the results and, if a path is given, writes them with all that is needed to repeat them.

    `results` is a summary: samples that only lead to it are printed by the benchmark, if anywhere.
    """
    print(compact_json(results))
    if path is not None:
        module = _module()
        write_record(path, {**describe_run(module, f"python -m {module}"), "results": results})


def _module() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem
