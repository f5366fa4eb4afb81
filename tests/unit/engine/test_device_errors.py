"""Which errors end a step and which end everything on a device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.cuda.device_errors import failed_step, is_device_lost
from engine.cuda.results import LaunchedStep
from engine.cuda.runner import CudaModelRunner
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import u32
from engine.step.runner import DeviceLost

CPU = torch.device("cpu")
EMPTY = u32([])
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might come late"


def answers() -> None:
    """A device on which all is well."""


def is_silent() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def with_code(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error: in other words")
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL_ACCESS),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        with_code(700),
        with_code(719),
    ],
    ids=str,
)
def test_what_sticks_is_known_by_its_words_or_its_code(error: Exception) -> None:
    assert is_device_lost(error, answers)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        with_code(2),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx"),
        ValueError("an illegal memory access, as somebody's message puts it"),
        KeyError("row"),
    ],
    ids=str,
)
def test_after_other_errors_the_device_decides_by_its_answer(error: Exception) -> None:
    assert not is_device_lost(error, answers)
    assert is_device_lost(error, is_silent)


def test_only_the_first_line_is_told_and_caches_are_emptied_when_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    result = failed_step(3, torch.AcceleratorError(ILLEGAL_ACCESS), CPU).result()
    assert result.is_last
    assert result.step_id == 3
    assert result.error == "AcceleratorError: CUDA error: an illegal memory access was encountered"
    assert not emptied
    result = failed_step(4, torch.OutOfMemoryError("CUDA out of memory"), CPU).result()
    assert not result.is_last
    assert emptied


class Failing(CudaModelRunner):
    """Raises in every step what it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.rows = cast(Any, SimpleNamespace(take_changes=answers))
        self.device = CPU
        self._sizes_left = [cast(Any, None)]
        self.graphs = cast(Any, ())
        self.stage = None
        self._sizes_when_met = ([], [])

    def _launch(self, plan: StepPlan) -> Any:
        raise self.error

    def capture(self, sizes: object) -> None:
        raise self.error


PLAN = StepPlan(1, EMPTY, [], EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)


@pytest.mark.parametrize(
    ("error", "is_last"),
    [(torch.AcceleratorError(ILLEGAL_ACCESS), True), (torch.OutOfMemoryError("out of memory"), False)],
    ids=["illegal access", "out of memory"],
)
def test_a_runner_tells_with_the_failed_step_whether_it_was_the_last(error: Exception, is_last: bool) -> None:
    result = Failing(error).launch(PLAN).result()
    assert result.error.startswith(type(error).__name__)
    assert result.is_last is is_last


def test_a_device_that_fails_while_graphs_are_captured_is_not_taken_for_a_graph_too_many() -> None:
    with pytest.raises(DeviceLost, match="illegal memory access"):
        Failing(torch.AcceleratorError(ILLEGAL_ACCESS)).work_ahead()
    assert Failing(RuntimeError("no room for this graph")).work_ahead() is False


def fail_in(name: str) -> Callable[[], bool]:
    def call() -> bool:
        raise torch.AcceleratorError(f"CUDA error: unspecified launch failure in {name}")

    return call


def test_an_error_that_comes_with_the_result_is_told_and_not_raised() -> None:
    event = SimpleNamespace(query=fail_in("query"), synchronize=fail_in("synchronize"))
    buffers = SimpleNamespace(token_ids=torch.zeros(1))
    step = LaunchedStep(cast(Any, buffers), 0, 5, cast(Any, [0]), None, None, cast(Any, event))
    assert step.done()
    result = step.result()
    assert (result.step_id, result.is_last) == (5, True)
    assert result.error.endswith("unspecified launch failure in synchronize")
