"""Compiles the kernels with the machine's own C++ compiler, once for each compiler, each processor and each
state of the sources.

What it builds lies in the cache directory, so that the second start finds it. Without a compiler there are
no native kernels, and torch computes everything.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.cache_home import cache_home

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
# A product and a sum are fused only where the sources say so: where a compiler decides, two kernels that are
# to give the same bits may not.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-pthread", *WARNINGS)
# Instruction sets of x86-64 beyond the least that all processors have, with the flags that a file whose name
# ends in them is compiled with; from the least to the most. The library has those that the processor has and
# the compiler knows.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": AVX512,
}
TIMEOUT_S = 300.0
# In the cache directory.
DIRECTORY = "native"
# There is a driver of GPUs.
_NVIDIA = "/dev/nvidiactl"

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no library; the message says why."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: as words.
        version: the first line that it says of itself.
    """

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """$CXX, or else the first of COMPILERS that there is.

    Raises:
        BuildError: there is none, or it does not run.
    """
    configured = os.environ.get("CXX", "")
    command = (
        shlex.split(configured) if configured else [found for found in COMPILERS if shutil.which(found)][:1]
    )
    if not command:
        raise BuildError(f"there is no C++ compiler: neither $CXX nor {', '.join(COMPILERS)}")
    try:
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from error
    return Compiler(tuple(command), said.partition("\n")[0])


def build(cache: Path, flags: tuple[str, ...] = ()) -> Path:
    """The compiled library: from the cache, or made now, which takes some ten seconds
    of two processors.

    Args:
        cache: where libraries lie; made where it is missing.
        flags: given to the compiler behind the usual ones, such as a sanitizer's.

    Raises:
        BuildError: it cannot be compiled; with what the compiler said first.
        OSError: the cache cannot be written.
    """
    compiler = find_compiler()
    library = cache / f"libpagewire-{_fingerprint(compiler, flags)}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(library), tempfile.TemporaryDirectory(dir=cache, prefix=f".{library.stem}-") as scratch:
        if library.exists():  # another process made it meanwhile
            return library
        logger.info("compiling native kernels, once for this machine")
        objects = _compile(compiler, flags, Path(scratch))
        made = Path(scratch) / library.name
        _run([*compiler.command, *FLAGS, *flags, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(library)  # whole or not at all
    return library


def build_ahead(device: str, dtype: str) -> None:
    """Begins to build, in the background, what `build` will be asked for in this user's cache directory. What
    goes wrong `build` says then.

    Args:
        device, dtype: as in WorkerConfig; nothing is built where that will be a GPU, or numbers that no
            native kernel computes on.
    """
    if dtype not in ("auto", "float32") or (device != "cpu" and Path(_NVIDIA).exists()):
        return

    def work() -> None:
        try:
            build(cache_home() / DIRECTORY)
        except (BuildError, OSError) as error:
            logger.debug("no native kernels: %s", error)

    threading.Thread(target=work, name="native kernels", daemon=True).start()


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """One process or thread builds a library at a time: the others wait, and find what it made. What builders
    that died have left is removed."""
    with library.with_name(f".{library.stem}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in library.parent.glob(f".{library.stem}-*"):
            shutil.rmtree(left)
        yield


def _fingerprint(compiler: Compiler, flags: tuple[str, ...]) -> str:
    given = (compiler, FLAGS, INSTRUCTION_SETS, flags, platform.machine(), _processor())
    digest = hashlib.sha256(repr(given).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What the system says that the processor has: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: Compiler, flags: tuple[str, ...], scratch: Path) -> list[Path]:
    """The library's parts, those for the least processor first: a function that several have is linked from
    the first of them, and so runs wherever the library does."""
    known = {name: INSTRUCTION_SETS[name] for name in _instruction_sets(compiler, scratch)}
    macros = [f"-DPAGEWIRE_{name.upper()}" for name in known]

    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.stem}.o"
        extra = known.get(_instruction_set(source), ())
        _run([*compiler.command, *FLAGS, *flags, *macros, *extra, "-c", str(source), "-o", str(target)])
        return target

    order = ["", *known]
    chosen = [path for path in SOURCES.glob("*.cpp") if _instruction_set(path) in order]
    chosen.sort(key=lambda path: (order.index(_instruction_set(path)), path.name))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, reversed(chosen)))[::-1]  # those that take longest begin first


def _instruction_set(source: Path) -> str:
    """The one that a file is for, or none."""
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in INSTRUCTION_SETS else ""


def _instruction_sets(compiler: Compiler, scratch: Path) -> list[str]:
    """Those that the processor has and the compiler knows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    probe = scratch / "processor.so"
    _run([*compiler.command, *FLAGS, "-shared", str(SOURCES / "processor.cpp"), "-o", str(probe)])
    has = ctypes.CDLL(str(probe)).pagewire_processor_has
    return [
        name for name, extra in INSTRUCTION_SETS.items() if has(name.encode()) and _knows(compiler, extra)
    ]


def _knows(compiler: Compiler, extra: tuple[str, ...]) -> bool:
    """Whether the compiler compiles an empty file with these flags."""
    try:
        _run([*compiler.command, *extra, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        raise BuildError(f"{command[0]} failed: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error


if __name__ == "__main__":
    build(cache_home() / DIRECTORY)
