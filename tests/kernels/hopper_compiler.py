"""The process behind `compile_for_hopper`: compiles what each line of its input describes, until it ends."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_case(case: dict[str, Any]) -> dict[str, int]:
    """Sizes of one kernel's machine code; see `compile_for_hopper`."""
    module, name = case["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    parameters = list(kernel.arg_names)
    constants = {(parameters.index(key),): value for key, value in case["constants"].items()}
    signature = {key: case["signature"].get(key, "constexpr") for key in parameters}
    pointers = [i for i, key in enumerate(parameters) if signature[key][0] == "*"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case["options"])
    return {"cubin": len(binary.asm["cubin"]), "shared": binary.metadata.shared}


def main() -> None:
    """Answers on what was standard output; whatever a compiler prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = compile_case(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
