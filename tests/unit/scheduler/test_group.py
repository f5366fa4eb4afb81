"""Several ranks taken as one worker."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.dispatch.link import Rank
from engine.dispatch.records import StepResult
from engine.dispatch.sampling import u32
from scheduler.workers import group as module
from scheduler.workers.group import WorkerGroup


class FakeLink:
    """Results as ranks write them."""

    def __init__(self, num_ranks: int) -> None:
        self.facts = SimpleNamespace(reporting_rank=0)
        self.ranks = tuple(
            cast(Rank, SimpleNamespace(facts=SimpleNamespace(rank=rank))) for rank in range(num_ranks)
        )
        self.written: list[deque[StepResult]] = [deque() for _ in range(num_ranks)]

    def send_plan(self, plan: object) -> None: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...

    def poll_result(self, rank: int = 0) -> StepResult | None:
        return self.written[rank].popleft() if self.written[rank] else None


class Case:
    def __init__(self, num_ranks: int = 3) -> None:
        self.link, self.causes = FakeLink(num_ranks), list[str]()
        self.group = WorkerGroup(cast(Any, self.link), self.causes.append)

    def completes(self, rank: int, step_id: int, **fields: Any) -> None:
        self.link.written[rank].append(StepResult(step_id, u32([7] if rank == 0 else []), **fields))

    def late(self) -> list[int]:
        return [rank.facts.rank for rank in self.group.late_ranks()]


async def test_a_step_is_over_when_every_rank_has_completed_it() -> None:
    case = Case()
    case.completes(0, 4, execute_us=10)
    case.completes(0, 5)
    case.completes(2, 4, execute_us=30, more_ahead=True)
    assert case.group.poll_result() is None
    assert case.late() == [1]
    case.completes(1, 4, execute_us=20)
    result = case.group.poll_result()
    assert result is not None
    assert (result.step_id, result.token_ids.tolist(), result.error) == (4, [7], "")
    assert (result.execute_us, result.more_ahead) == (30, True)
    assert case.group.poll_result() is None
    assert case.late() == [1, 2]
    case.completes(2, 5)
    case.completes(1, 5)
    result = case.group.poll_result()
    assert result is not None
    assert result.step_id == 5


async def test_any_ranks_failure_is_the_steps_and_names_the_rank() -> None:
    case = Case()
    case.completes(0, 4)
    case.completes(1, 4, error="out of memory")
    case.completes(2, 4)
    result = case.group.poll_result()
    assert result is not None
    assert result.error == "rank 1: out of memory"
    assert not case.causes


async def test_a_rank_whose_device_is_lost_is_told_of_before_the_others_are_done() -> None:
    case = Case()
    case.completes(1, 4, error="CUDA error: ECC", is_last=True)
    result = case.group.poll_result()
    assert result is not None
    assert (result.error, result.is_last) == ("rank 1: CUDA error: ECC", True)


async def test_the_group_is_given_up_if_others_wait_for_a_rank_that_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FAILURE_SECONDS", 0.05)
    case = Case(2)
    case.completes(1, 4, error="out of memory")
    assert case.group.poll_result() is None
    await asyncio.sleep(0.02)
    assert not case.causes
    await asyncio.sleep(0.05)
    assert case.causes == ["a step failed on some ranks only: rank 1: out of memory"]
    case = Case(2)
    case.completes(1, 4, error="out of memory")
    assert case.group.poll_result() is None
    case.completes(0, 4, error="out of memory")
    assert case.group.poll_result() is not None
    await asyncio.sleep(0.1)
    assert not case.causes


async def test_ranks_that_report_different_steps_are_broken() -> None:
    case = Case(2)
    case.completes(0, 4)
    case.completes(1, 5)
    with pytest.raises(ValueError, match="steps 4 and 5"):
        case.group.poll_result()
