"""A worker that takes too long is asked for its stacks and killed; one that is slow or idle is not."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scheduler.workers import watchdog as module
from scheduler.workers.watchdog import FIRST_STEPS_FACTOR, NUM_FIRST_STEPS, Watchdog

TIMEOUT = 10.0


class FakeLoop:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, call: Callable[..., None], *arguments: Any) -> SimpleNamespace:
        entry = (due, call, arguments)
        self.timers.append(entry)
        return SimpleNamespace(cancel=lambda: self.timers.remove(entry))

    def call_later(self, seconds: float, call: Callable[..., None], *arguments: Any) -> SimpleNamespace:
        return self.call_at(self.now + seconds, call, *arguments)

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.timers and min(self.timers)[0] <= end:
            entry = min(self.timers, key=lambda each: each[0])
            self.timers.remove(entry)
            self.now = max(self.now, entry[0])
            entry[1](*entry[2])
        self.now = end

    def stand_still(self, seconds: float) -> None:
        """As if the process had been stopped."""
        self.now += seconds
        self.sleep(0)


class Process:
    pid = 4242

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []
        self.forbidden = False

    def signal(self, number: signal.Signals) -> None:
        if self.forbidden:
            raise PermissionError("not allowed")
        self.signals.append(number)


class LateRank:
    def __init__(self, rank: int, process: Process) -> None:
        self.rank, self.process = rank, process

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid}, cuda:{self.rank})"


class Case:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_warm: bool = False) -> None:
        self.loop, self.process, self.causes = FakeLoop(), Process(), cast(list[str], [])
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self.loop)
        self.late = [LateRank(0, self.process)]
        self.to_be_found: list[bool] = []
        group = SimpleNamespace(late_ranks=lambda: self.late, facts=SimpleNamespace(num_stages=1))
        describe = "step 9 with 3 requests (a, b, c)"
        self.watchdog = Watchdog(cast(Any, group), TIMEOUT, is_warm, lambda: describe, self._leave)

    def _leave(self, cause: str, to_be_found: bool) -> None:
        self.causes.append(cause)
        self.to_be_found.append(to_be_found)

    def warm_up(self) -> None:
        """Past the first steps."""
        self.watchdog.began()
        self.watchdog.finished(NUM_FIRST_STEPS, 0)
        self.loop.sleep(2 * FIRST_STEPS_FACTOR * TIMEOUT)
        assert not self.loop.timers


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch)


def test_a_hung_step_is_named_its_worker_asked_for_its_stacks_and_then_killed(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    case.warm_up()
    with caplog.at_level(logging.INFO):
        case.watchdog.began()
        case.loop.sleep(TIMEOUT - 0.1)
        assert not case.process.signals
        case.loop.sleep(0.2)
        assert case.process.signals == [signal.SIGUSR1]
        case.loop.sleep(module.STACKS_SECONDS)
    assert case.process.signals == [signal.SIGUSR1, signal.SIGKILL]
    assert "worker rank 0 (pid 4242, cuda:0) hangs: step 9 with 3 requests (a, b, c)" in caplog.text
    assert len(case.causes) == 1
    assert not case.loop.timers


def test_the_first_steps_may_take_longer(case: Case) -> None:
    case.watchdog.began()
    case.loop.sleep(FIRST_STEPS_FACTOR * TIMEOUT - 0.1)
    assert not case.process.signals
    case.loop.sleep(0.2)
    assert case.process.signals


def test_a_worker_that_has_computed_for_another_scheduler_has_no_first_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(monkeypatch, is_warm=True)
    case.watchdog.began()
    case.loop.sleep(TIMEOUT - 0.1)
    assert not case.process.signals
    case.loop.sleep(0.2)
    assert case.process.signals


def test_steps_that_follow_each_other_never_count_as_one(case: Case) -> None:
    case.warm_up()
    case.watchdog.began()
    for _ in range(50):
        case.loop.sleep(0.9 * TIMEOUT)
        case.watchdog.finished(1, 1)
        case.watchdog.began()
        assert len(case.loop.timers) == 1
    assert not case.process.signals


def test_time_spent_idle_does_not_count_and_sets_no_timer(case: Case) -> None:
    case.warm_up()
    case.watchdog.began()
    case.watchdog.finished(1, 0)
    case.loop.sleep(0.9 * TIMEOUT)
    case.watchdog.began()
    case.loop.sleep(0.9 * TIMEOUT)
    case.watchdog.finished(1, 0)
    assert not case.process.signals
    case.loop.sleep(2 * TIMEOUT)
    assert not case.loop.timers


def test_a_scheduler_that_was_stopped_itself_gives_the_worker_its_time(case: Case) -> None:
    case.warm_up()
    case.watchdog.began()
    case.loop.stand_still(10 * TIMEOUT)
    assert not case.process.signals
    case.loop.sleep(TIMEOUT + 0.1)
    assert case.process.signals


def test_a_worker_that_goes_on_while_it_is_asked_lives(case: Case) -> None:
    case.warm_up()
    case.watchdog.began()
    case.loop.sleep(TIMEOUT + 0.1)
    case.watchdog.finished(1, 1)
    case.loop.sleep(module.STACKS_SECONDS)
    assert case.process.signals == [signal.SIGUSR1]
    assert not case.causes
    case.loop.sleep(TIMEOUT + module.STACKS_SECONDS)
    assert case.process.signals == [signal.SIGUSR1, signal.SIGUSR1, signal.SIGKILL]


def test_a_worker_that_may_not_be_signalled_is_left(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.warm_up()
    case.process.forbidden = True
    case.watchdog.began()
    case.loop.sleep(TIMEOUT + 0.1)
    assert len(case.causes) == 1
    assert "cannot be killed from here (not allowed), and is left" in caplog.text
    assert not case.loop.timers


def test_of_ranks_that_all_wait_none_is_killed_before_it_is_known_which_one_hangs(case: Case) -> None:
    case.late.append(LateRank(1, Process()))
    case.warm_up()
    case.watchdog.began()
    case.loop.sleep(TIMEOUT + module.STACKS_SECONDS + 0.1)
    assert [rank.process.signals for rank in case.late] == [[signal.SIGUSR1], [signal.SIGUSR1]]
    assert case.to_be_found == [True]


def test_the_one_rank_that_has_not_completed_a_step_is_killed(case: Case) -> None:
    case.warm_up()
    case.watchdog.began()
    case.loop.sleep(TIMEOUT + module.STACKS_SECONDS + 0.1)
    assert case.process.signals == [signal.SIGUSR1, signal.SIGKILL]
    assert case.to_be_found == [False]
