"""Prints every dependency in pyproject.toml at its lower bound, for pip: `make test-lowest` tests with those.

python tools/lowest_versions.py [NAME...]    all of them, the development ones too, without those named
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """`name>=1.2,!=1.3; marker` as `name==1.2`. One without a lower bound stays as it is."""
    name, bound, version = re.fullmatch(r"([\w.-]+)(?:(>=|==)([\w.]+))?.*", requirement).groups()  # type: ignore[union-attr]
    return f"{name}=={version}" if bound else name


def main() -> None:
    """Runs the command line."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    print(*(each for each in map(lowest, every) if each.partition("==")[0] not in sys.argv[1:]), sep="\n")


if __name__ == "__main__":
    main()
