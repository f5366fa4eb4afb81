"""Compiles a Triton kernel for Hopper on any machine: no GPU is needed to find out that it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

case = json.load(sys.stdin)
module, name = case["kernel"].split(":")
kernel = getattr(importlib.import_module(module), name)
parameters = list(kernel.arg_names)
constants = {(parameters.index(key),): value for key, value in case["constants"].items()}
signature = {key: case["signature"].get(key, "constexpr") for key in parameters}
aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(parameters) if signature[key][0] == "*"}
source = ASTSource(kernel, signature, constants, aligned)
binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case["options"])
print(json.dumps({"cubin": len(binary.asm["cubin"]), "shared": binary.metadata.shared}))
"""


def compile_for_hopper(
    kernel: str, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> dict[str, int]:
    """Compiles to machine code for sm_90, in a process where Triton's interpreter is off.

    Args:
        kernel: "module:name".
        signature: parameter -> Triton type, such as "*bf16" or "i32"; pointers count as 16-byte aligned.
        constants: every other parameter's value.
        options: num_warps, num_stages and the like.

    Returns:
        Sizes in bytes: "cubin", and "shared" memory of a program (228 KiB minus 1 is the chip's limit).

    Raises:
        AssertionError: it does not compile; the message holds the compiler's.
    """
    case = {"kernel": kernel, "signature": signature, "constants": constants, "options": options}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return result
