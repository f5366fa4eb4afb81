"""Where the kernels' tests run: on a GPU with `make test-gpu`, without one in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

# Of a test's cases, `make test` takes the first few, and of the others one of so many.
ALL_CASES, EACH_OF = 3, 3


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _hasten_interpreter()
        _round_like_a_gpu()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU every test here is the GPU's. Without, `make test` takes some of each test's cases, and
    `make test-all` the others too, since the interpreter takes minutes over them."""
    cases: Counter[str] = Counter()
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
            continue
        test = item.nodeid.partition("[")[0]
        if cases[test] >= ALL_CASES and cases[test] % EACH_OF:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1


def _hasten_interpreter() -> None:
    """Spares Triton's interpreter more than half of its time.

    It repeats the patching of `triton.language` at every call from kernel to function, for which the first of
    each module is enough: the kernel's launch patches what is undone after it. And it checks every integer
    operation for overflow, by another in 64 bits, which shapes as small as the interpreter's never reach.
    Every conversion of a type builds a table of all types, and every shape the types of its members, which
    hardly anything asks for.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patched = set()

    def call(function: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in patched:
            patched.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    _remember_numpy_types()
    _type_tuples_when_asked()


def _round_like_a_gpu() -> None:
    """To e4m3 as GPUs do, and torch: the interpreter loses what rounding carries to the exponent."""
    convert = interpreter._convert_float

    def converted(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if source != tl.float32 or target != tl.float8e4nv:
            result: np.ndarray = convert(values, source, target, mode)
            return result
        exact = torch.from_numpy(np.ascontiguousarray(values))
        return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def _remember_numpy_types() -> None:
    convert, known = interpreter._get_np_dtype, {}

    def remembered(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = convert(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = remembered


def _type_tuples_when_asked() -> None:
    """Of a tuple that is made without a type; with one it is made as before."""
    make = tl.core.tuple.__init__

    def make_untyped(self: tl.core.tuple, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    def find_type(self: tl.core.tuple) -> tl.core.tuple_type:
        if "_type" not in vars(self):
            make(self, self.values)
        return vars(self)["_type"]

    def set_type(self: tl.core.tuple, type: tl.core.tuple_type) -> None:
        vars(self)["_type"] = type

    tl.core.tuple.__init__ = make_untyped
    tl.core.tuple.type = property(find_type, set_type)
