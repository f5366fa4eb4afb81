"""The scheduler core as a state machine: submit, step, finish, abort, preempt, evict and fail in any order.

A miniature worker executes the plans and refuses one that reads KV that was never written. After every rule
the books are checked: no block lost, none shared without a count or between KV groups, none held behind its
group's window, no row used twice; and every request ends
in exactly one terminal event with exactly the tokens that the model gives for its prompt alone.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import replace
from itertools import cycle

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.dispatch.limits import EngineLimits, fewest_blocks
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord
from pagewire.base.errors import Overloaded
from pagewire.wire.block_hashes import root_hash
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.blocks.groups import NO_BLOCK
from scheduler.core import Scheduler
from scheduler.policy.suspects import MAX_LONE_FAILURES
from scheduler.request import EndReason, Request, Status
from scheduler.settings import BATCHING_STRATEGIES, INFLIGHT, CoreSettings
from scheduler.step import InFlight
from tests.unit.scheduler.executor import (
    MiniatureWorker,
    continuation,
    logprobs_of,
    next_token,
    pooled_state,
    prompt_logprob,
    to_mask,
)

VOCAB = 5
STOP_TOKEN = 4
MAX_MODEL_LEN = 24
BLOCK_SIZES = [3, 5]
# The KV groups of models: full attention, mixed layers, one window for all layers.
KV_WINDOWS = [(0,), (0,), (0, 4), (0, 7, 7), (0, 0, 1), (5,), (9, 2)]
CONSTRAINT = StructuredOutput(regex="whatever the masks say")


def allowed_after(tokens: list[int]) -> frozenset[int]:
    """The "grammar": which tokens may come next is a hash of all before; never none, seldom all."""
    return frozenset({next_token((-1, *tokens), VOCAB), next_token((-2, *tokens), VOCAB)})


def constrained_continuation(prompt: list[int], count: int) -> list[int]:
    """What the model generates under the masks."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tuple(tokens), VOCAB, allowed_after(tokens)))
    return tokens[len(prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_spare_blocks=st.integers(0, 6),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        max_num_waiting=st.integers(1, 6),
        depth=st.integers(1, 3),
        target_itl=st.sampled_from([None, 1e-6, 0.02]),
        block_size=st.sampled_from(BLOCK_SIZES),
        kv_windows=st.sampled_from(KV_WINDOWS),
        max_tokens_per_step=st.sampled_from([1, 1, 4]),
        strategy=st.sampled_from([INFLIGHT, INFLIGHT, *BATCHING_STRATEGIES]),
    )
    def start(
        self,
        num_spare_blocks: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_num_waiting: int,
        depth: int,
        target_itl: float | None,
        block_size: int,
        kv_windows: tuple[int, ...],
        max_tokens_per_step: int,
        strategy: str,
    ) -> None:
        self.depth = depth
        # No request fits that has all of its tokens in all groups, nor many at once.
        least = max(fewest_blocks(MAX_MODEL_LEN, size, kv_windows) for size in BLOCK_SIZES)
        self.limits = EngineLimits(
            num_blocks=least + num_spare_blocks,
            kv_windows=kv_windows,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            max_tokens_per_step=max_tokens_per_step,
        )
        self.settings = CoreSettings(
            max_num_waiting=max_num_waiting,
            enable_prefix_caching=caching,
            target_itl=target_itl,
            batching_strategy=strategy,
        )
        self.scheduler = Scheduler(self.limits, self.settings)
        self.worker = self._new_worker()
        self.in_flight: deque[StepPlan] = deque()
        self.doomed = 0
        self.requests: dict[str, Request] = {}
        self.terminal: Counter[str] = Counter()
        self.aborted: set[str] = set()
        self.received: dict[str, list[int]] = {}
        self.told: dict[str, list[float]] = {}
        self.failed_alone: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.batch_began, self.batch = 0, list[Request]()

    def _new_worker(self) -> MiniatureWorker:
        limits, most = self.limits, self.limits.max_tokens_per_step
        worker = MiniatureWorker(
            limits.block_size,
            VOCAB,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            limits.kv_windows,
        )
        if most > 1:
            worker.generosity = cycle((most, 1, 2, most)).__next__
        return worker

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        stops=st.booleans(),
        logprobs=st.booleans(),
        prompt_logprobs=st.sampled_from([-1, -1, 0, 2]),
        constrained=st.booleans(),
        salt=st.sampled_from(["", "", "a"]),
        client=st.sampled_from(["", "", "a/1", "a/2", "b"]),
        timeout=st.sampled_from([None, None, 0.01, 60.0]),
        num_parts=st.sampled_from([1, 1, 3]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        stops: bool,
        logprobs: bool,
        prompt_logprobs: int,
        constrained: bool,
        salt: str,
        client: str,
        timeout: float | None,
        num_parts: int,
    ) -> None:
        """A request, or one in several parts: completions of one prompt."""
        group = f"g{len(self.requests)}"
        for part in range(num_parts):
            request = Request(
                f"r{len(self.requests)}",
                array("I", prompt),
                len(prompt),
                SamplingRecord(logprobs=0 if logprobs else -1, prompt_logprobs=prompt_logprobs),
                max_total_tokens=len(prompt) + max_tokens,
                stop_token_ids=frozenset([STOP_TOKEN] if stops else []),
                priority=priority,
                client=client,
                owner=(prompt, max_tokens),
                root_hash=root_hash(salt),
                constraint=CONSTRAINT if constrained else None,
                group=group,
                part=part,
            )
            self._add(request, timeout)

    @precondition(lambda self: hasattr(self, "requests") and self.requests)
    @rule(data=st.data(), kept=st.integers(0, 4), token=st.integers(0, VOCAB - 1), constrained=st.booleans())
    def fork(self, data: st.DataObject, kept: int, token: int, constrained: bool) -> None:
        """A request goes on where another is, or was a few tokens ago: a beam, a sample, the next turn."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        is_beam = data.draw(st.booleans())
        tokens = self.requests[name].token_ids.tolist()
        prompt = [*tokens[: len(tokens) - kept], token][: MAX_MODEL_LEN - 1]
        self._add(
            Request(
                f"r{len(self.requests)}",
                array("I", prompt),
                len(prompt),
                SamplingRecord(),
                max_total_tokens=len(prompt) + 3,
                owner=(prompt, 3),
                constraint=CONSTRAINT if constrained else None,
                group=self.requests[name].group if is_beam else "",
                part=5 if is_beam else 0,
            )
        )

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN),
        pooling=st.integers(1, 3),
        priority=st.integers(-1, 1),
    )
    def submit_pooling(self, prompt: list[int], pooling: int, priority: int) -> None:
        name = f"r{len(self.requests)}"
        record = SamplingRecord(pooling=pooling)
        total = len(prompt) + 1
        self._add(
            Request(
                name, array("I", prompt), len(prompt), record, total, priority=priority, owner=(prompt, 0)
            )
        )

    def _add(self, request: Request, timeout: float | None = None) -> None:
        name = request.request_id
        full = self.scheduler.num_waiting >= self.settings.max_num_waiting
        try:
            refused = self.scheduler.add(request, timeout=timeout)
        except Overloaded:
            assert full or timeout is not None
        else:
            assert full == (refused is not None)
            if refused is not None:
                assert refused.client.partition("/") != request.client.partition("/")
                assert refused.num_cached_tokens < 0, "nobody heard of it yet"
                self.refused.add(refused.request_id)
                self.terminal[refused.request_id] += 1
            self.requests[name] = request
            self.received[name] = []
            self.told[name] = []

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def plan(self) -> None:
        self._plan()

    def _plan(self) -> bool:
        """Plans a step, if there is anything to compute."""
        begun = [r for r in self._live() if r.num_cached_tokens >= 0]
        plan = self.scheduler.schedule()
        self._check_batch(begun)
        if plan is not None:
            self._check_masks(plan)
            self._check_suspects_are_alone()
            self.in_flight.append(plan)
        return plan is not None

    def _live(self) -> list[Request]:
        return [r for r in self.requests.values() if r.status is not Status.ENDED]

    def _check_batch(self, begun: list[Request]) -> None:
        """Where requests are computed in batches, nobody joins those that have begun but who waited when
        their batch did, and other parts of clients' requests."""
        joined = self.scheduler.take_admitted()
        strategy = self.settings.batching_strategy
        if strategy == INFLIGHT:
            return
        if not begun and joined:
            self.batch_began = len(self.requests)
            self.batch = []
        self.batch += [request for request in joined if not request.part]
        assert all(self._number(request) < self.batch_began for request in self.batch)
        assert len(self.batch) <= (1 if strategy == "none" else self.limits.max_num_seqs)

    def _number(self, request: Request) -> int:
        return list(self.requests).index(request.request_id)

    @precondition(lambda self: hasattr(self, "requests") and self._live())
    @rule(data=st.data())
    def overdue(self, data: st.DataObject) -> None:
        """A request has waited long enough for others, if it waits."""
        self.scheduler.overdue(self.requests[data.draw(st.sampled_from(sorted(self.requests)))])

    def _check_suspects_are_alone(self) -> None:
        *before, step = self.scheduler._in_flight
        if any(request.suspicion is not None for request in step.scheduled):
            assert len(step.scheduled) == 1
            assert not before

    def _check_masks(self, plan: StepPlan) -> None:
        """Exactly the requests with a constraint are sampled under a mask, made for all their tokens."""
        for column, request in enumerate(self.scheduler._in_flight[-1].scheduled):
            if plan.samples[column] and request.constraint is not None:
                expected = to_mask(allowed_after(request.token_ids.tolist()), VOCAB)
                assert plan.masks[column].tolist() == expected.tolist()
            else:
                assert column not in plan.masks

    def _unmasked(self) -> list[Request]:
        return [r for r in self.requests.values() if r.is_blocked and r.status is not Status.ENDED]

    @precondition(lambda self: hasattr(self, "requests") and self._unmasked())
    @rule(data=st.data())
    def give_mask(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._unmasked()))
        self.scheduler.allow(request, to_mask(allowed_after(request.token_ids.tolist()), VOCAB))

    @precondition(lambda self: self.in_flight)
    @rule(milliseconds=st.sampled_from([0, 1, 10, 60_000]))
    def step(self, milliseconds: int = 0) -> None:
        doomed, self.doomed = self.doomed > 0, max(self.doomed - 1, 0)
        result = self.worker.execute(self.in_flight.popleft(), fail=doomed)
        result.execute_us = milliseconds * 1000
        self._apply(result)

    @precondition(lambda self: self.in_flight and not self.doomed)
    @rule()
    def fail(self) -> None:
        self._note_failure([self.scheduler._in_flight[0]])
        self._apply(self.worker.execute(self.in_flight.popleft(), fail=True))
        self.doomed = len(self.in_flight)  # planned before the failure was known, they build on it

    @precondition(lambda self: hasattr(self, "requests"))
    @rule(block_size=st.sampled_from(BLOCK_SIZES))
    def lose_worker(self, block_size: int) -> None:
        """It dies, with whatever is in flight, and another takes its place, perhaps with other blocks."""
        self._note_failure([step for step in self.scheduler._in_flight if not step.void])
        live, condemned = self.scheduler.evacuate("the worker died")
        self.in_flight.clear()
        self.doomed = 0
        self.terminal.update(request.request_id for request in condemned)
        for request in condemned:
            self._check_tokens(request)
        self.limits = replace(self.limits, block_size=block_size)
        self.scheduler = Scheduler(self.limits, self.settings)
        self.worker = self._new_worker()
        for request in live:
            self.scheduler.add(request, resumed=True)

    def _note_failure(self, steps: list[InFlight]) -> None:
        names = {request.request_id for step in steps for request in step.scheduled}
        if len(names) == 1:
            self.failed_alone.update(names)

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
        for request, entry in output.prompt_logprobs:
            name, prompt = request.request_id, request.owner[0]  # type: ignore[index]
            assert name not in self.aborted
            assert not self.received[name], "the prompt's come before the first token"
            assert entry.first == 1 + len(self.told[name])
            assert entry.top_ids.shape == (len(entry.logprobs), request.sampling.prompt_logprobs)
            expected = [prompt_logprob(prompt, entry.first + i) for i in range(len(entry.logprobs))]
            assert entry.logprobs.tolist() == expected
            self.told[name] += expected
        for request, state in output.pooled:
            assert request in output.ended
            prompt = request.owner[0]  # type: ignore[index]
            assert state.tolist() == np.array([pooled_state(prompt, request.sampling.pooling)], "f4").tolist()
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
        count = min(max_tokens, MAX_MODEL_LEN - len(prompt))
        if request.constraint is not None:
            expected = constrained_continuation(prompt, count)
        else:
            expected = continuation(prompt, count, VOCAB)
        received = self.received[request.request_id]
        if request.sampling.prompt_logprobs >= 0 and received:
            assert len(self.told[request.request_id]) == len(prompt) - 1
        if request.end_reason is EndReason.ERROR:
            assert self.failed_alone[request.request_id] >= MAX_LONE_FAILURES
            assert "quarantined" in request.error
        if request.is_pooling:
            assert not received
            assert request.end_reason in (EndReason.STOP, EndReason.ERROR)
            return
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
        group_of: dict[int, int] = {}
        for request in self.requests.values():
            for index, block_id in enumerate(request.block_ids):
                if block_id != NO_BLOCK:
                    held[block_id] += 1
                    group = index % self.limits.num_kv_groups
                    assert group_of.setdefault(block_id, group) == group
            assert (request.row >= 0) == (request.status is Status.RUNNING)
        pool = self.scheduler.pool
        assert all(pool.ref_count(block_id) == held[block_id] for block_id in range(pool.num_blocks))
        rows = [request.row for request in self.requests.values() if request.row >= 0]
        assert len(rows) == len(set(rows)) == self.scheduler.num_running <= self.limits.max_num_seqs
        waiting = [r for r in self.requests.values() if r.status is Status.WAITING]
        assert len(waiting) == self.scheduler.num_waiting
        self._check_shares(waiting)

    @invariant()
    def requests_hold_what_their_next_steps_read(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        limits, rows = self.limits, self.scheduler._rows
        for request in self.requests.values():
            if request.status is not Status.RUNNING:
                continue
            for group, window in enumerate(limits.kv_windows):
                table = request.block_ids[group :: limits.num_kv_groups]
                first = next((i for i, each in enumerate(table) if each != NO_BLOCK), len(table))
                assert NO_BLOCK not in table[first:]
                assert len(table) * limits.block_size == rows.num_held[request.row]
                # A step in flight may have sampled more tokens than the one that it was planned for.
                behind = int(rows.num_computed[request.row]) - window + 1 if window else 0
                slack = limits.max_tokens_per_step - 1
                assert max(behind - slack * 4, 0) // limits.block_size <= first
                assert first <= max(behind, 0) // limits.block_size

    def _check_shares(self, waiting: list[Request]) -> None:
        """Who has how many rows, and how many requests that wait, is known of every client and user."""
        shares = self.scheduler.shares
        queued = [request for request in waiting if request.suspicion is None]
        running = [r for r in self.requests.values() if r.status is Status.RUNNING]
        for tally, requests in ((shares.clients.waiting, queued), (shares.clients.running, running)):
            counts = Counter(r.client.partition("/")[0] for r in requests)
            assert Counter({share.name: tally[share] for share in tally._counts}) == counts
            assert (tally.most() is None) == (not counts)
            if (most := tally.most()) is not None:
                assert tally[most] == max(counts.values())
        for request in queued:
            assert request.share is not None
            same = [each for each in queued if each.client == request.client]
            assert request.share.client.group.waiting[request.share] == len(same)  # type: ignore[union-attr]

    @invariant()
    def what_is_remembered_of_running_requests_is_true(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        remembered = self.scheduler._wants
        if remembered.num_steps:
            found = self.scheduler._rows.wants(self.scheduler.running)
            assert remembered.decoding == found.decoding
            assert remembered.singles == found.singles
            assert remembered.chunked == found.chunked
            assert remembered.num_steps == found.num_steps

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            for request in self._unmasked():
                self.scheduler.allow(request, to_mask(allowed_after(request.token_ids.tolist()), VOCAB))
            for request in self._live():
                self.scheduler.overdue(request)
            while len(self.in_flight) < self.depth and self._plan():
                pass
            if not self.in_flight:
                break
            self.step()
            self.books_balance()
        assert all(self.terminal[name] == 1 for name in self.requests), "each request ends exactly once"
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
