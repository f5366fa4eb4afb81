"""Batches that begin and end together: who is in one, when it begins, and that nobody is left behind."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest

from engine.dispatch.limits import EngineLimits
from engine.dispatch.sampling import Pooling, SamplingRecord
from pagewire.base.errors import ConfigError
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.policy.waiting import WaitingQueue
from scheduler.request import EndReason, Request, Status
from scheduler.settings import BATCHING_STRATEGIES, CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker, continuation
from tests.unit.scheduler.simulation import SimulatedService, of_a_gpu

VOCAB = 50
LIMITS = EngineLimits(
    num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, vocab_size=VOCAB
)
IN_BATCHES = [strategy for strategy in BATCHING_STRATEGIES if strategy != "inflight"]


class Service:
    """The core and its worker."""

    def __init__(self, strategy: str, **limits: Any) -> None:
        self.limits = replace(LIMITS, **limits)
        self.settings = CoreSettings(batching_strategy=strategy)
        self.requests: list[Request] = []
        self.start()

    def start(self) -> None:
        """With a new worker, and whoever was left by the old one."""
        self.core = Scheduler(self.limits, self.settings)
        self.worker = MiniatureWorker(4, VOCAB, 64, self.limits.max_num_seqs)
        for request in self.requests:
            if request.status is not Status.ENDED:
                self.core.add(request, resumed=True)

    def add(self, max_tokens: int = 3, *, prompt: int = 5, sampling: Any = None, **fields: Any) -> Request:
        tokens = [len(self.requests) % VOCAB] * prompt
        request = Request(
            f"r{len(self.requests)}",
            array("I", tokens),
            prompt,
            sampling or SamplingRecord(),
            max_total_tokens=prompt + max_tokens,
            **fields,
        )
        self.requests.append(request)
        self.core.add(request)
        return request

    def step(self, *, fail: bool = False) -> list[Request]:
        """Runs a step; returns its requests, none if there is nothing to compute."""
        plan = self.core.schedule()
        if plan is None:
            return []
        scheduled = self.core._in_flight[0].scheduled
        self.core.update(self.worker.execute(plan, fail=fail))
        return scheduled

    def run(self) -> list[list[Request]]:
        """Runs until nothing can be computed; returns the requests of each step."""
        steps = []
        while scheduled := self.step():
            steps.append(scheduled)
        return steps

    def check(self) -> None:
        """Everybody has what the model generates."""
        for request in self.requests:
            prompt = request.token_ids[: request.num_prompt_tokens].tolist()
            count = request.max_total_tokens - len(prompt)
            assert request.end_reason is EndReason.LENGTH
            assert request.token_ids.tolist() == prompt + continuation(prompt, count, VOCAB)


def test_none_computes_one_request_at_a_time_in_order() -> None:
    service = Service("none")
    requests = [service.add() for _ in range(3)]
    assert service.run() == [[requests[0]]] * 3 + [[requests[1]]] * 3 + [[requests[2]]] * 3
    assert service.core.num_batches == 3
    service.check()


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_a_full_batch_begins_at_once_and_nobody_joins_it(strategy: str) -> None:
    service = Service(strategy)
    first = [service.add(max_tokens) for max_tokens in (2, 6, 6)]
    assert service.step() == [], "a place is free"
    first.append(service.add(6))
    assert service.step() == first
    late = service.add()
    more_important = service.add(priority=-1)
    steps = service.run()
    assert steps[0] == first
    assert steps[-1] == first[1:], "rows are free, and stay so"
    assert late.status is Status.WAITING
    service.core.overdue(late)
    assert set(service.step()) == {late, more_important}, "the batch is over, and one has waited long enough"
    service.run()
    service.check()
    assert service.core.num_batches == 2


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_who_became_overdue_during_a_batch_begins_right_after_it(strategy: str) -> None:
    service = Service(strategy)
    for _ in range(4):
        service.add()
    assert len(service.step()) == 4
    late = service.add()
    service.core.overdue(late)
    assert [len(step) for step in service.run()] == [4, 4, 1, 1, 1]
    assert service.run() == []


def test_an_overdue_request_that_is_aborted_begins_no_batch() -> None:
    service = Service("dynamic")
    aborted, _ = service.add(), service.add()
    service.core.overdue(aborted)
    service.core.abort(aborted)
    service.core.overdue(aborted)
    assert service.step() == []


def test_completions_of_one_request_run_together_however_many_they_are() -> None:
    service = Service("none")
    parts = [service.add(group="a", part=part) for part in range(6)]
    other = service.add(group="b")
    steps = service.run()
    assert steps[0] == parts[:4], "as many as there are rows"
    assert steps.index([other]) == len(steps) - 3
    service.check()


@pytest.mark.parametrize("strategy", IN_BATCHES)
def test_beams_join_the_batch_that_runs_and_wait_for_nobody(strategy: str) -> None:
    service = Service(strategy)
    beam = service.add(1, group="search")
    service.core.overdue(beam)
    assert service.step() == [beam]
    for step in range(1, 5):
        beams = [service.add(1, group="search", part=2 * step + number) for number in range(2)]
        if step == 2:
            others = [service.add(2, group=f"other {number}") for number in range(4)]
        assert set(beams) <= set(service.step()), "at each token"
    service.run()
    assert all(other.status is Status.ENDED for other in others)
    service.check()


@pytest.mark.parametrize("strategy", IN_BATCHES)
def test_a_request_id_that_is_used_again_is_another_request(strategy: str) -> None:
    service = Service(strategy, max_num_seqs=1)
    first, second = service.add(group="same"), service.add(group="same")
    steps = service.run()
    assert steps == [[first]] * 3 + [[second]] * 3


@pytest.mark.parametrize("strategy", IN_BATCHES)
def test_the_other_parts_begin_if_the_first_is_aborted_while_it_waits(strategy: str) -> None:
    service = Service(strategy)
    parts = [service.add(group="a", part=part) for part in range(3)]
    service.core.abort(parts[0])
    for part in parts:
        service.core.overdue(part)
    assert set(service.step()) == set(parts[1:])


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_a_preempted_request_keeps_its_place_before_more_important_ones(strategy: str) -> None:
    service = Service(strategy, num_blocks=16, max_num_seqs=2)
    batch = [service.add(40), service.add(40)]
    assert service.step() == batch
    late = service.add(priority=-5)
    service.core.overdue(late)
    steps = service.run()
    assert service.core.counters.num_preemptions > 0, "the situation did not come about"
    begins = next(number for number, step in enumerate(steps) if late in step)
    assert steps[begins:] == [[late]] * 3
    service.check()


@pytest.mark.parametrize("strategy", IN_BATCHES)
def test_the_batch_goes_on_after_a_failed_step_and_with_another_worker(strategy: str) -> None:
    service = Service(strategy, max_num_seqs=2)
    requests = [service.add() for _ in range(4)]
    first = service.step()
    assert service.step(fail=True) == first
    service.step()
    service.core.evacuate("the worker died")
    service.start()
    others = [request for request in requests if request not in first]
    steps = service.run()
    last_of_first = max(number for number, step in enumerate(steps) if set(step) & set(first))
    assert not any(set(step) & set(others) for step in steps[: last_of_first + 1])
    service.check()


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_a_batch_is_shared_fairly_by_clients(strategy: str) -> None:
    service = Service(strategy)
    for _ in range(6):
        service.add(client="a")
    for _ in range(2):
        service.add(client="b")
    assert sorted(request.client for request in service.step()) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("strategy", IN_BATCHES)
def test_prompts_longer_than_a_step_and_embeddings_are_computed(strategy: str) -> None:
    service = Service(strategy, max_num_batched_tokens=7)
    pooled = service.add(1, prompt=20, sampling=SamplingRecord(pooling=Pooling.LAST))
    rest = [service.add(prompt=20) for _ in range(3)]
    assert len(service.run()) >= 80 // 7
    assert pooled.end_reason is EndReason.STOP
    service.requests = rest
    service.check()


def test_requests_are_batched_in_flight_by_a_queue_that_knows_no_batches() -> None:
    assert type(Service("inflight").core._waiting) is WaitingQueue


def _latencies(strategy: str) -> tuple[float, float]:
    """(mean seconds to the end, seconds in all) of requests of several lengths, one every 30 ms."""
    limits = replace(LIMITS, num_blocks=4096, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=512)
    service = SimulatedService(limits, of_a_gpu, CoreSettings(batching_strategy=strategy))
    wait = 0.05

    def arrive(name: str, max_tokens: int) -> None:
        request = service.add(name, 20, max_tokens)
        service.arrivals.append((service.now + wait, lambda: service.core.overdue(request)))
        service.arrivals = type(service.arrivals)(sorted(service.arrivals, key=lambda each: each[0]))

    for number in range(40):
        max_tokens = (10, 20, 40, 120)[number % 4]
        service.arrivals.append((0.03 * number, lambda n=number, m=max_tokens: arrive(f"r{n}", m)))  # type: ignore[misc]
    while service.step() or service.arrivals:
        if not service.core.num_in_flight and service.arrivals:
            service.now = max(service.now, service.arrivals[0][0])
    assert len(service.times) == 40
    ends = [times[-1] - service.added[name] for name, times in service.times.items()]
    return sum(ends) / len(ends), service.now


def test_in_flight_is_faster_than_batches_and_those_than_one_at_a_time() -> None:
    measured = {strategy: _latencies(strategy) for strategy in BATCHING_STRATEGIES}
    for index in range(2):
        assert measured["inflight"][index] < 0.7 * measured["dynamic"][index]
        assert measured["dynamic"][index] == measured["static"][index], "they differ in the wait alone"
        assert measured["dynamic"][index] < 0.7 * measured["none"][index]


def _config(**options: Any) -> SchedulerConfig:
    return SchedulerConfig(listen=("unix:s",), worker_socket="w", **options)  # type: ignore[arg-type]


def test_static_waits_a_second_and_dynamic_not_at_all_unless_told() -> None:
    assert _config().batch_delay is None
    assert _config(batching_strategy="none").batch_delay is None
    assert _config(batching_strategy="static").batch_delay == 1.0
    assert _config(batching_strategy="dynamic").batch_delay == 0.0
    for strategy in ("static", "dynamic"):
        delay = _config(batching_strategy=strategy, max_queue_delay_microseconds=2500).batch_delay
        assert delay == pytest.approx(0.0025)
    assert _config(max_queue_delay_microseconds=0).batch_delay is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching_strategy": "continuous"}, "one of none, static, dynamic, inflight"),
        ({"max_queue_delay_microseconds": 5}, "0 or left out with batching_strategy inflight"),
        ({"batching_strategy": "dynamic", "max_queue_delay_microseconds": -1}, "at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**options)
