"""What a program's worker does ahead between two calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.dispatch.control import SchedulerGone, WorkerEndpoint, WorkerSession
from engine.dispatch.link import WorkerLink
from engine.dispatch.records import StepResult
from engine.dispatch.sampling import u32
from pagewire.offline.idle_work import IdleWork
from scheduler.workers.group import GroupResults
from scheduler.workers.work_ahead import WorkAhead
from tests.unit.dispatch.test_control import attach


class Worker:
    """Answers every plan as one that has so many pieces to do ahead."""

    def __init__(self, session: WorkerSession) -> None:
        self.session, self.num_left, self.num_done = session, 3, 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        try:
            while (plan := self.session.next_plan(block=True)) is not None:
                assert plan.work_ahead
                self.may_answer.wait()
                self.num_left -= 1
                self.num_done += 1
                self.session.send_result(StepResult(plan.step_id, u32([]), more_ahead=self.num_left > 0))
        except SchedulerGone:
            return


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[WorkerLink, Worker]]:
    endpoint = WorkerEndpoint(tmp_path / "worker.sock")
    link, session = attach(endpoint)
    yield link, Worker(session)
    link.close()
    endpoint.close()


def until(worker: Worker, num_done: int) -> None:
    deadline = time.monotonic() + 5
    while worker.num_done < num_done:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_does_all_there_is_and_no_more(pair: tuple[WorkerLink, Worker]) -> None:
    link, worker = pair
    ahead = WorkAhead(more=True)
    idle = IdleWork(link, GroupResults(link), ahead)
    idle.begin()
    until(worker, 3)
    assert idle.end(5)
    assert not ahead.more
    idle.begin()
    assert idle.end(0)
    assert worker.num_done == 3


def test_it_stops_after_the_piece_that_is_being_done(pair: tuple[WorkerLink, Worker]) -> None:
    link, worker = pair
    worker.may_answer.clear()
    ahead = WorkAhead(more=True)
    idle = IdleWork(link, GroupResults(link), ahead)
    idle.begin()
    assert not idle.end(0.1)
    worker.may_answer.set()
    assert idle.end(5)
    assert worker.num_done == 1
    assert (ahead.more, ahead.in_flight) == (True, False)
