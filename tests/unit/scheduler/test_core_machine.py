"""The scheduler core as a state machine: submit, step, finish, abort, preempt, evict and fail in any order.

A miniature worker executes the plans and refuses one that reads KV that was never written. After every rule
the books are checked: no block lost, none shared without a count, no row used twice; and every request ends
in exactly one terminal event with exactly the tokens that the model gives for its prompt alone.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.dispatch.records import SamplingRecord, StepPlan, StepResult
from pagewire.errors import Overloaded
from scheduler.core import Scheduler
from scheduler.limits import SchedulerLimits
from scheduler.request import EndReason, Request, Status
from tests.unit.scheduler.executor import MiniatureWorker, continuation, logprobs_of

VOCAB = 5
STOP_TOKEN = 4
MAX_MODEL_LEN = 24


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(8, 14),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        max_num_waiting=st.integers(1, 6),
        depth=st.integers(1, 3),
    )
    def start(
        self, num_blocks: int, max_num_seqs: int, budget: int, caching: bool, max_num_waiting: int, depth: int
    ) -> None:
        self.depth = depth
        block_size = 3
        self.limits = SchedulerLimits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            max_num_waiting=max_num_waiting,
            enable_prefix_caching=caching,
        )
        self.scheduler = Scheduler(self.limits)
        self.worker = MiniatureWorker(block_size, VOCAB, budget, max_num_seqs)
        self.in_flight: deque[StepPlan] = deque()
        self.doomed = 0
        self.requests: dict[str, Request] = {}
        self.terminal: Counter[str] = Counter()
        self.aborted: set[str] = set()
        self.received: dict[str, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        stops=st.booleans(),
        logprobs=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, priority: int, stops: bool, logprobs: bool) -> None:
        name = f"r{len(self.requests)}"
        request = Request(
            name,
            array("I", prompt),
            len(prompt),
            SamplingRecord(logprobs=0 if logprobs else -1),
            max_total_tokens=len(prompt) + max_tokens,
            stop_token_ids=frozenset([STOP_TOKEN] if stops else []),
            priority=priority,
            owner=(prompt, max_tokens),
        )
        full = self.scheduler.num_waiting >= self.limits.max_num_waiting
        try:
            self.scheduler.add(request)
        except Overloaded:
            assert full
        else:
            assert not full
            self.requests[name] = request
            self.received[name] = []

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def plan(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append(plan)

    @precondition(lambda self: self.in_flight)
    @rule()
    def step(self) -> None:
        doomed, self.doomed = self.doomed > 0, max(self.doomed - 1, 0)
        self._apply(self.worker.execute(self.in_flight.popleft(), fail=doomed))

    @precondition(lambda self: self.in_flight and not self.doomed)
    @rule()
    def fail(self) -> None:
        self._apply(self.worker.execute(self.in_flight.popleft(), fail=True))
        self.doomed = len(self.in_flight)  # planned before the failure was known, they build on it

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        if self.scheduler.abort(request):
            self.aborted.add(request.request_id)
            self.terminal[request.request_id] += 1
        assert request.status is Status.ENDED
        assert not request.block_ids

    def _apply(self, result: StepResult) -> None:
        output = self.scheduler.update(result)
        for index, (request, token) in enumerate(output.tokens):
            assert request.request_id not in self.aborted
            expected = logprobs_of(token) if request.sampling.logprobs >= 0 else None
            assert output.logprobs.get(index) == expected
            self.received[request.request_id].append(token)
        for request in output.ended:
            self.terminal[request.request_id] += 1
            self._check_tokens(request)

    def _check_tokens(self, request: Request) -> None:
        prompt, max_tokens = request.owner  # type: ignore[misc]
        expected = continuation(prompt, min(max_tokens, MAX_MODEL_LEN - len(prompt)), VOCAB)
        received = self.received[request.request_id]
        if request.end_reason is EndReason.ERROR:
            assert received == expected[: len(received)]
            return
        if request.stop_token_ids and STOP_TOKEN in expected:
            stop = expected.index(STOP_TOKEN)
            assert request.end_reason is EndReason.STOP or stop == len(expected) - 1
            expected = expected[: stop + 1]
        assert received == expected

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.pool.check()
        held: Counter[int] = Counter()
        for request in self.requests.values():
            held.update(request.block_ids)
            assert (request.row >= 0) == (request.status is Status.RUNNING)
        pool = self.scheduler.pool
        assert all(pool.ref_count(block_id) == held[block_id] for block_id in range(pool.num_blocks))
        rows = [request.row for request in self.requests.values() if request.row >= 0]
        assert len(rows) == len(set(rows)) == self.scheduler.num_running <= self.limits.max_num_seqs
        waiting = [r for r in self.requests.values() if r.status is Status.WAITING]
        assert len(waiting) == self.scheduler.num_waiting

    @invariant()
    def what_is_remembered_of_running_requests_is_true(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        remembered = self.scheduler._wants
        if remembered.num_steps:
            found = self.scheduler._rows.wants(self.scheduler.running)
            assert remembered.decoding == found.decoding
            assert remembered.chunked == found.chunked
            assert remembered.num_steps == found.num_steps

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            while len(self.in_flight) < self.depth and (plan := self.scheduler.schedule()) is not None:
                self.in_flight.append(plan)
            if not self.in_flight:
                break
            self.step()
            self.books_balance()
        assert all(self.terminal[name] == 1 for name in self.requests), "each request ends exactly once"
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
