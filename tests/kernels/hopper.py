"""Compiles a Triton kernel for Hopper on any machine: no GPU is needed to find out that it does not."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


def compile_for_hopper(
    kernel: str, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> dict[str, Any]:
    """Compiles to machine code for sm_90, in a process where Triton's interpreter is off.

    All calls of a test session share that process, since importing torch takes longer than a compilation.

    Args:
        kernel: "module:name".
        signature: parameter -> Triton type, such as "*bf16" or "i32"; pointers count as 16-byte aligned.
        constants: every other parameter's value.
        options: num_warps, num_stages and the like.

    Returns:
        Sizes in bytes: "cubin", and "shared" memory of a program (228 KiB minus 1 is the chip's limit). How
        many products on the tensor cores are "in_flight" at most, where it waits for those before them. How
        it treats the kernel before it (see engine/kernels/launch.py): how often it "waits" for it, and before
        that, the parameters through which it has reached what it reads ("early_reads"), how many
        "early_writes" there are, and "early_exits".

    Raises:
        AssertionError: it does not compile; the message holds the compiler's.
    """
    case = {"kernel": kernel, "signature": signature, "constants": constants, "options": options}
    compiler = _compiler()
    assert compiler.stdin is not None
    assert compiler.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        compiler.stdin.write(json.dumps(case) + "\n")
        compiler.stdin.flush()
    line = compiler.stdout.readline()
    if not line:  # the case took the whole process with it; the next one gets another
        _compiler.cache_clear()
        raise AssertionError(f"the compiler ended with {compiler.wait()}; see standard error")
    answer: dict[str, Any] = json.loads(line)
    assert "error" not in answer, answer["error"][-4000:]
    return answer


def compile_overlapping(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    early_reads: Collection[str] = (),
    **options: int,
) -> dict[str, Any]:
    """`compile_for_hopper` for a kernel that overlaps with the one before it.

    Args:
        early_reads: parameters through which it may read before it waits; everything else must come after.

    Raises:
        AssertionError: it does not compile, or breaks the rules of engine/kernels/launch.py.
    """
    result = compile_for_hopper(kernel, signature, {**constants, "OVERLAP": True}, launch_pdl=True, **options)
    assert (result["waits"], result["early_writes"], result["early_exits"]) == (1, 0, 0)
    assert set(result["early_reads"]) == set(early_reads), result["early_reads"]
    return result


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """The process. However this one ends, its end closes that one's input."""
    compiler = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.hopper_compiler"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    atexit.register(_end, compiler)
    return compiler


def _end(compiler: subprocess.Popen[str]) -> None:
    compiler.kill()
    with contextlib.suppress(BrokenPipeError):
        compiler.communicate()
