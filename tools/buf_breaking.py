"""Checks that protos/ breaks no client of the last release: the last tag, or main before the first release.

Does nothing, and says so, where git knows neither (an exported source archive, a shallow clone).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = (
    ("describe", "--tags", "--abbrev=0"),
    ("rev-parse", "--verify", "--quiet", "origin/main"),
    ("rev-parse", "--verify", "--quiet", "main"),
)


def base_ref() -> str | None:
    """The git revision whose protos must stay compatible, if there is one."""
    for candidate in CANDIDATES:
        found = subprocess.run(  # nosec B607 # whichever git the developer has
            ["git", *candidate], cwd=ROOT, capture_output=True, text=True
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return None


def buf() -> str:
    """The buf beside this interpreter, or the one on the PATH."""
    beside = Path(sys.executable).parent / "buf"
    return str(beside) if beside.exists() else (shutil.which("buf") or "buf")


def main() -> int:
    """Runs the check; returns the exit status."""
    base = base_ref()
    if base is None:
        print("buf breaking: no tag and no main to compare with; skipped")
        return 0
    return subprocess.run([buf(), "breaking", "--against", f".git#ref={base}"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
