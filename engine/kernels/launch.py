"""Launches that overlap with the end of the kernel before (programmatic dependent launch, Hopper and on).

A kernel launched so may start while the one before it still runs, and holds at `wait_for_previous` until that
one has ended and all it wrote is visible. What comes before the wait - its launch, address arithmetic, loads
of weights - costs no time of its own. In a CUDA graph such launches become programmatic edges.

What keeps this right, in every kernel that is launched with `overlap_options`:

- Every program calls `wait_for_previous`, once, on every path, before anything is written (an earlier kernel
  may still read there) and before anything is read that a kernel of the step writes.
- The next kernel is let go only after the wait. So when a kernel runs ahead of its own wait, the one before
  it has passed its wait, and all kernels before that one have ended, with their writes in the L2 cache. By
  the same rule a kernel that has ended implies that all before it have, whatever mixture of overlapping and
  ordinary launches (of cuBLAS, of torch) they were.
- Ahead of the wait, therefore, a kernel may load what nothing writes while steps run: weights, tables. It may
  load what a kernel wrote that is surely not the one just before it, past the L1 cache (".cg"), which is not
  surely emptied between such kernels. And it may prefetch anything into the L2 cache, where all writes go.
  A step's inputs are made four kernels or more before any of them is read so: enough even after a library's
  kernel that lets the next one go ahead of its own wait.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from triton.runtime.driver import driver

# Arguments of a launch that overlaps and of one that does not.
OVERLAPPING: dict[str, bool] = {"OVERLAP": True, "launch_pdl": True}
ORDINARY: dict[str, bool] = {"OVERLAP": False}

_forbidden = False


def overlap_options() -> dict[str, bool]:
    """What a kernel that calls `wait_for_previous` is launched with."""
    # The interpreter has one kernel at a time, and no driver.
    if _forbidden or triton.knobs.runtime.interpret or not _supported_by(driver.active):
        return ORDINARY
    return OVERLAPPING


def set_overlap(allowed: bool) -> None:
    """Allows launches to overlap (where the device can), as they do at first, or forbids it, in this process.

    Graphs that were captured before stay as they are.
    """
    global _forbidden
    _forbidden = not allowed


@functools.cache
def _supported_by(active_driver: Any) -> bool:
    target = active_driver.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Whatever earlier kernels wrote may be read from here on. Lets the next kernel start, and wait."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_lines(pointers, mask, OVERLAP: tl.constexpr):
    """Asks for the L2 cache's lines at these addresses where the mask is set, if the launch overlaps."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [pointers, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def settle_keys(*functions: triton.JITFunction) -> None:
    """Has Triton find out now under which keys it caches functions that several kernels call, the callees
    before their callers.

    A kernel's key covers the constants that its callees name only where their own keys are known already. So
    it would depend on which of two kernels with a callee in common comes first, and what one process has
    compiled would not be found by another.
    """
    for function in functions:
        if isinstance(function, triton.JITFunction):  # not in the interpreter
            function.cache_key  # noqa: B018 - found when it is first asked for
