"""Steps fail and workers die: the request at fault ends alone, and everybody else gets every token."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import Pooling, SamplingRecord
from pagewire.wire.block_hashes import root_hash
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.core import Scheduler
from scheduler.policy.suspects import MAX_LONE_FAILURES
from scheduler.request import EndReason, Request, Status
from scheduler.step import InFlight
from tests.unit.scheduler.executor import MiniatureWorker, continuation, to_mask

VOCAB = 50
LIMITS = EngineLimits(
    num_blocks=24,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=12,
    max_model_len=32,
    vocab_size=VOCAB,
)
FIELDS: dict[str, dict[str, Any]] = {"pooling": {"pooling": Pooling.MEAN}, "prompt": {"prompt_logprobs": 1}}
ANY = StructuredOutput(regex="whatever the masks say")


@dataclass
class Engine:
    """A core over workers that fail or die.

    Attributes:
        poison: request id -> the position whose computation is too much for the worker.
        dies: whether it dies of that, or reports an error.
        kills: numbers of steps in which somebody kills the worker.
        alone: how often a request was all that was in flight when the worker failed.
    """

    poison: dict[str, int] = field(default_factory=dict)
    dies: bool = True
    kills: frozenset[int] = frozenset()
    limits: EngineLimits = LIMITS
    scheduler: Scheduler = field(init=False)
    in_flight: deque[StepPlan] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    alone: Counter[str] = field(default_factory=Counter)
    num_failures: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        limits = self.limits
        self.scheduler = Scheduler(limits)
        self.worker = MiniatureWorker(
            limits.block_size, VOCAB, limits.max_num_batched_tokens, limits.max_num_seqs
        )
        self.doomed = 0

    def submit(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def plan(self) -> StepPlan | None:
        for request in self.requests:
            if request.is_blocked and request.status is not Status.ENDED:
                self.scheduler.allow(request, to_mask(frozenset(range(VOCAB)), VOCAB))
        plan = self.scheduler.schedule() if len(self.in_flight) < 2 else None
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def run(self, num_steps: int = 2000) -> None:
        """Until nothing is left to do, or so many steps were executed."""
        end = self.num_steps + num_steps
        while self.num_steps < end:
            while self.plan() is not None:
                pass
            if not self.in_flight:
                return
            self.step()

    def step(self) -> None:
        self.num_steps += 1
        plan, step = self.in_flight[0], self.scheduler._in_flight[0]
        poisoned = any(
            self.poison.get(request.request_id, -1) in range(start, start + count)
            for request, start, count in zip(
                step.scheduled, plan.starts.tolist(), plan.counts.tolist(), strict=True
            )
        )
        if (poisoned and self.dies and not self.doomed) or self.num_steps in self.kills:
            self.lose_worker()
            return
        self.in_flight.popleft()
        if poisoned and not self.doomed:
            self._note([step])
            self.doomed = 1 + len(self.in_flight)
        output = self.scheduler.update(self.worker.execute(plan, fail=self.doomed > 0))
        self.doomed = max(self.doomed - 1, 0)
        self.ended += output.ended

    def lose_worker(self, successors: EngineLimits | None = None) -> None:
        """It dies, and another takes its place, which may have other limits."""
        self.limits = successors or self.limits
        self._note([each for each in self.scheduler._in_flight if not each.void])
        live, condemned = self.scheduler.evacuate("the worker died")
        self.ended += condemned
        self.in_flight.clear()
        self._start()
        for request in live:
            self.scheduler.add(request, resumed=True)

    def _note(self, steps: list[InFlight]) -> None:
        self.num_failures += 1
        names = {request.request_id for each in steps for request in each.scheduled}
        if len(names) == 1:
            self.alone.update(names)

    def check(self, innocent: list[Request]) -> None:
        """These got what the model gives for their prompts alone, everybody ended, nothing is left over."""
        assert sorted(each.request_id for each in self.ended) == sorted(r.request_id for r in self.requests)
        for request in innocent:
            assert request.end_reason is not EndReason.ERROR, request.error
            if request.is_pooling:
                continue
            prompt = request.token_ids[: request.num_prompt_tokens].tolist()
            count = request.max_total_tokens - len(prompt)
            assert request.token_ids[len(prompt) :].tolist() == continuation(prompt, count, VOCAB)
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


def make(name: str, prompt: list[int], max_tokens: int, **kind: Any) -> Request:
    sampling = SamplingRecord(**kind)
    total = len(prompt) + (1 if sampling.pooling else max_tokens)
    return Request(name, array("I", prompt), len(prompt), sampling, total)


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    requests = []
    for index in range(draw(st.integers(1, 7))):
        prompt = draw(st.lists(st.integers(0, 3), min_size=1, max_size=20))
        kind = draw(st.sampled_from(["plain", "plain", "plain", "pooling", "prompt", "constrained"]))
        fields = FIELDS.get(kind, {})
        request = make(f"r{index}", prompt, draw(st.integers(1, 31 - len(prompt))), **fields)
        request.constraint = ANY if kind == "constrained" else None
        request.priority = draw(st.integers(0, 1))
        requests.append(request)
    return requests


@given(requests=workloads(), dies=st.booleans(), data=st.data())
@settings(max_examples=50)
def test_requests_that_kill_the_worker_are_quarantined_and_the_others_get_every_token(
    requests: list[Request], dies: bool, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(requests), unique=True, max_size=3))
    # The last token is never computed; every position before it is, at some time.
    poison = {
        r.request_id: data.draw(st.integers(0, r.max_total_tokens - 2), label=r.request_id) for r in chosen
    }
    for request in chosen:  # a prefix from the cache is not computed and harms nobody
        request.root_hash = root_hash(request.request_id)
    engine = Engine(poison, dies)
    for request in requests:
        engine.submit(request)
        engine.run(data.draw(st.integers(0, 3)))
    engine.run()
    engine.check([request for request in requests if request not in chosen])
    for request in chosen:
        assert request.end_reason is EndReason.ERROR
        assert "quarantined" in request.error
        assert engine.alone[request.request_id] == MAX_LONE_FAILURES
    assert engine.scheduler.counters.num_quarantined <= len(chosen)
    assert engine.num_failures <= (MAX_LONE_FAILURES + 1) * len(chosen)


@given(requests=workloads(), kills=st.frozensets(st.integers(1, 60), max_size=12))
@settings(max_examples=50)
def test_a_worker_killed_from_outside_condemns_nobody_unless_it_hits_the_same_request_alone_twice(
    requests: list[Request], kills: frozenset[int]
) -> None:
    engine = Engine(kills=kills)
    for request in requests:
        engine.submit(request)
    engine.run()
    hit_twice = [r for r in requests if engine.alone[r.request_id] >= MAX_LONE_FAILURES]
    engine.check([request for request in requests if request not in hit_twice])


def test_a_single_kill_amid_full_batches_takes_each_request_at_most_two_steps_alone() -> None:
    engine = Engine(kills=frozenset([6]))
    requests = [engine.submit(make(f"r{i}", [i, 1, 2], 12)) for i in range(4)]
    engine.run(6)
    suspects = [request for request in requests if request.suspicion is not None]
    assert len(suspects) == 4
    num_alone = 0
    while any(request.suspicion is not None for request in requests):
        if engine.plan() is not None:
            num_alone += engine.scheduler._in_flight[-1].scheduled[0].suspicion is not None
        else:
            engine.step()
    assert num_alone <= 2 * len(suspects)
    engine.run()
    engine.check(requests)
    assert engine.num_failures == 1


def test_others_get_a_step_after_each_full_one_of_a_suspect_with_a_long_prompt() -> None:
    engine = Engine(kills=frozenset([3]))
    long = engine.submit(make("long", [1] * 26, 4))
    engine.run(3)
    assert long.suspicion is not None
    other = engine.submit(make("other", [2], 12))
    seen = []
    while long.suspicion is not None:
        plan = engine.plan()
        assert plan is not None
        seen.append(engine.scheduler._in_flight[-1].scheduled)
        engine.step()
    assert seen[:4] == [[long], [other], [long], [other]]
    engine.run()
    engine.check([long, other])


def test_many_small_suspects_do_not_keep_the_others_waiting() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=200, max_num_seqs=16, num_blocks=64)
    engine = Engine(kills=frozenset([1]), limits=limits)
    requests = [engine.submit(make(f"r{i}", [i, 1], 4)) for i in range(16)]
    engine.run(1)
    other = engine.submit(make("other", [2], 12))
    turns = []
    while other.status is not Status.ENDED:
        if engine.plan() is not None:
            turns.append(other in engine.scheduler._in_flight[-1].scheduled)
        else:
            engine.step()
    assert turns[:9] == [False] * 8 + [True]
    engine.run()
    engine.check([*requests, other])


def test_a_suspect_that_waits_for_its_mask_lets_the_others_pass() -> None:
    engine = Engine(kills=frozenset([1]))
    request = make("constrained", [1, 2], 3)
    request.constraint = ANY
    engine.submit(request)
    engine.run(1)
    assert request.suspicion is not None
    request.mask = None
    request.mask_at = -1
    other = engine.submit(make("other", [2], 5))
    for _ in range(8):
        plan = engine.scheduler.schedule()
        if plan is not None:
            engine.in_flight.append(plan)
        if engine.in_flight:
            engine.step()
    assert other.status is Status.ENDED
    assert request.suspicion is not None
    engine.run()
    engine.check([request, other])


def test_a_worker_that_dies_with_nothing_in_flight_is_nobodys_doing() -> None:
    engine = Engine()
    request = engine.submit(make("r", [1, 2, 3], 6))
    engine.run(2)
    while engine.in_flight:
        engine.step()
    for _ in range(5):
        engine.lose_worker()
    assert request.suspicion is None
    engine.run()
    engine.check([request])


@pytest.mark.parametrize(("before", "after"), [(16, 32), (4, 6)])
def test_a_successor_with_another_block_size_gives_nobody_anothers_blocks(before: int, after: int) -> None:
    limits = replace(LIMITS, block_size=before, num_blocks=24, max_num_batched_tokens=64, max_model_len=96)
    engine = Engine(limits=limits)
    shared = list(range(before))
    requests = [engine.submit(make(f"r{i}", [*shared, *[30 + i] * 40], 5)) for i in range(3)]
    engine.run(2)
    engine.lose_worker(replace(limits, block_size=after))
    engine.run()
    engine.check(requests)


def test_a_death_after_a_reported_failure_is_the_same_incident() -> None:
    """The step planned upon the failed one is void; that the worker dies in it says nothing new."""
    engine = Engine(poison={"r": 2}, dies=False)
    request = engine.submit(make("r", [1, 2, 3], 6))
    engine.plan()
    engine.plan()
    engine.step()
    assert request.suspicion is not None
    assert request.suspicion.num_failures == 1
    engine.poison.clear()
    engine.lose_worker()
    assert request.suspicion.num_failures == 1
    engine.run()
    engine.check([request])


def test_one_that_is_cleared_starts_anew() -> None:
    engine = Engine()
    request = engine.submit(make("r", [1, 2, 3], 20))
    for _ in range(5):
        engine.run(4)
        engine.plan()
        engine.lose_worker()
        assert request.suspicion is not None
        assert request.suspicion.num_failures == 1
    engine.run()
    engine.check([request])


def test_a_suspect_that_is_aborted_keeps_the_blame_for_its_step() -> None:
    engine = Engine(kills=frozenset([2]))
    culprit = engine.submit(make("culprit", [1] * 3, 9))
    other = engine.submit(make("other", [2] * 3, 9))
    engine.run(2)
    assert engine.plan() is not None
    (tried,) = engine.scheduler._in_flight[-1].scheduled
    bystander = other if tried is culprit else culprit
    engine.scheduler.abort(tried)
    assert engine.plan() is None, "nobody shares its step's fate"
    engine.lose_worker()
    assert bystander.suspicion is not None
    assert bystander.suspicion.num_failures == 0
    engine.run()
    assert bystander.token_ids[3:].tolist() == continuation(bystander.token_ids[:3].tolist(), 9, VOCAB)


@pytest.mark.parametrize("num_seqs", [1, 2])
def test_suspects_get_rows_and_blocks_that_others_hold(num_seqs: int) -> None:
    limits = EngineLimits(
        num_blocks=8,
        block_size=4,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8,
        max_model_len=32,
        vocab_size=VOCAB,
    )
    engine = Engine(kills=frozenset([3, 9]), limits=limits)
    requests = [engine.submit(make(f"r{i}", [i] * 14, 10)) for i in range(4)]
    engine.run()
    engine.check(requests)
