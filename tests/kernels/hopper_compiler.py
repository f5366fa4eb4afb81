"""The process behind `compile_for_hopper`: compiles what each line of its input describes, until it ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """What one kernel was compiled to; see `compile_for_hopper`."""
    module, name = case["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    parameters = list(kernel.arg_names)
    constants = {(parameters.index(key),): value for key, value in case["constants"].items()}
    signature = {key: case["signature"].get(key, "constexpr") for key in parameters}
    pointers = [i for i, key in enumerate(parameters) if signature[key][0] == "*"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case["options"])
    passed = [key for key in parameters if signature[key] != "constexpr"]
    return {
        "cubin": len(binary.asm["cubin"]),
        "shared": binary.metadata.shared,
        "in_flight": max(
            map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", binary.asm["ptx"])), default=0
        ),
        **ahead_of_wait(binary.asm["ptx"], [key if signature[key][0] == "*" else "" for key in passed]),
    }


def ahead_of_wait(ptx: str, pointers: list[str]) -> dict[str, Any]:
    """What a kernel touches before it waits for the one before it, by following its parameters' registers.

    Args:
        pointers: the parameters' names, "" for those that are no pointers.
    """
    before, *after = ptx.split("griddepcontrol.wait")
    origins: dict[str, set[str]] = {}
    reads: set[str] = set()
    writes = 0
    for line in before.splitlines():
        operation, _, operands = line.strip().lstrip("{ ").partition(" ")
        if operation.startswith("@"):
            operation, _, operands = operands.strip().partition(" ")
        registers = re.findall(r"%[a-z]+\d+", operands)
        of = set[str]().union(*(origins.get(register, set()) for register in registers))
        if parameter := re.search(r"_param_(\d+)", operands):
            # A tensor descriptor takes up several, and nothing may be read through one early anyway.
            number = int(parameter[1])
            of.add(pointers[number] if number < len(pointers) else "")
        if operation.startswith(("ld.global", "cp.async")):
            reads |= of
        if operation.startswith(("st.global", "red.", "atom.")):
            writes += 1
        # The result comes first: one register, or several in braces.
        result = operands.partition("}" if operands.startswith("{") else ",")[0]
        for register in re.findall(r"%[a-z]+\d+", result):
            origins[register] = of | origins.get(register, set())
    return {
        "waits": len(after),
        "early_reads": sorted(reads - {""}),
        "early_writes": writes,
        "early_exits": before.count("ret;"),
    }


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
