"""Generates the Python stubs of protos/ into the source tree, or checks that those there are current.

python tools/stubs.py            regenerate
python tools/stubs.py --check    exit 1 and name every stub that differs, is missing or has no proto
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(target: Path) -> None:
    """Writes the stubs of every proto under `target`, laid out as packages.

    A proto without services gets no _grpc module: protoc writes an empty one, which is removed.

    Raises:
        subprocess.CalledProcessError: protoc refused a proto; it has printed why.
    """
    protos = sorted(PROTOS.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *outputs, *map(str, protos)], check=True)
    for proto in protos:
        if "\nservice " not in proto.read_text():
            stem = proto.relative_to(PROTOS).with_suffix("")
            (target / stem.parent / f"{stem.name}_pb2_grpc.py").unlink()


def stubs_under(root: Path) -> dict[str, bytes]:
    """The content of every stub in the pagewire package under `root`, by its path relative to it."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for pattern in STUB_PATTERNS
        for path in (root / "pagewire").rglob(pattern)
    }


def drift() -> list[str]:
    """What differs between the stubs in the source tree and fresh ones, a line each; empty if nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = stubs_under(Path(scratch))
    present = stubs_under(ROOT)
    problems = [f"{path}: missing" for path in fresh.keys() - present.keys()]
    problems += [f"{path}: no proto generates it" for path in present.keys() - fresh.keys()]
    problems += [
        f"{path}: out of date" for path in fresh.keys() & present.keys() if fresh[path] != present[path]
    ]
    return sorted(problems)


def main() -> int:
    """Runs the command line; returns the exit status."""
    if sys.argv[1:] == ["--check"]:
        problems = drift()
        if problems:
            print(*problems, "Run `make proto` and commit the result.", sep="\n", file=sys.stderr)
        return 1 if problems else 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
