"""Generates the Python stubs of protos/ into the source tree, or checks that those there are current.

python tools/stubs.py            regenerate
python tools/stubs.py --check    exit 1 and name every stub that differs, is missing or has no proto

Stubs run with the protobuf and the grpcio of their generator and with newer ones, never with older. So the
generator is an old one, and the lower bounds in pyproject.toml follow it. It needs an old protobuf itself,
which nothing else should have to use: it lives in an environment of its own, made at the first use.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
SHARED_PACKAGE = "package inference;"
"""Of protos with names that are not ours alone: other programs' stubs have messages of the same names."""
GENERATOR = "grpcio-tools==1.72.1"
ENVIRONMENT = ROOT / ".venv" / GENERATOR


def protoc() -> list[str]:
    """The command that runs the compiler, which is installed if it is not there.

    Raises:
        subprocess.CalledProcessError: it cannot be installed; pip has printed why.
    """
    python = ENVIRONMENT / "bin" / "python"
    installed = ENVIRONMENT / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", GENERATOR]
        subprocess.run(pip, check=True)
        installed.touch()
    return [str(python), "-m", "grpc_tools.protoc", f"-I{PROTOS}"]


def generate(target: Path) -> None:
    """Writes the stubs of every proto under `target`, laid out as packages.

    A proto without services gets no _grpc module: protoc writes an empty one, which is removed. Messages of
    SHARED_PACKAGE are registered in a pool of their own, because a process that registers two of one name,
    those of Triton's client and ours, ends with an error.

    Raises:
        subprocess.CalledProcessError: protoc refused a proto; it has printed why.
    """
    protos = sorted(PROTOS.rglob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*protoc(), *outputs, *map(str, protos)], check=True)
    # None leaves a field unset. Of bool fields only newer generators say so.
    for stub in target.rglob("*_pb2.pyi"):
        stub.write_text(re.sub(r"(\w+): bool = \.\.\.", r"\1: _Optional[bool] = ...", stub.read_text()))
    for proto in protos:
        if "\nservice " not in proto.read_text():
            stem = proto.relative_to(PROTOS).with_suffix("")
            (target / stem.parent / f"{stem.name}_pb2_grpc.py").unlink()
        if SHARED_PACKAGE in proto.read_text():
            stub = target / proto.relative_to(PROTOS).parent / f"{proto.stem}_pb2.py"
            stub.write_text(
                stub.read_text().replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")
            )


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
