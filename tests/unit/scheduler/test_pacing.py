"""When steps are planned: how late, which wait for masks, and who gains by it."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace

import pytest

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import SamplingRecord, u32
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.core import Scheduler
from scheduler.request import Request
from scheduler.settings import CoreSettings
from scheduler.workers.pacing import Pacing
from tests.unit.scheduler.simulation import SimulatedService

SHORT_STEP_US, LONG_STEP_US = 4_000, 80_000
MASK = u32([2**32 - 1, 2**32 - 1])
NUM_STEPS = 20


def _request(constrained: bool) -> Request:
    return Request(
        request_id="r",
        token_ids=array("I", [1, 2, 3]),
        num_prompt_tokens=3,
        max_total_tokens=60,
        stop_token_ids=frozenset(),
        sampling=SamplingRecord(),
        priority=0,
        constraint=StructuredOutput(regex="a*") if constrained else None,
    )


def _run(requests: list[Request], step_us: int) -> int:
    """Computes steps as a driver does, with masks there as soon as the token; returns the most that were in
    flight at once towards the end."""
    scheduler, pacing = Scheduler(_LIMITS, _SETTINGS), Pacing()
    for number, request in enumerate(requests):
        scheduler.add(request)
        if request.constraint is not None and number == 0:
            scheduler.allow(request, MASK)  # the others' grammars take longer: they begin out of step
    in_flight: deque[StepPlan] = deque()
    deepest = 0
    for step in range(NUM_STEPS):
        while (
            len(in_flight) < 2
            and not pacing.holds_back(scheduler)
            and (plan := scheduler.schedule()) is not None
        ):
            in_flight.append(plan)
        if step > NUM_STEPS // 2:
            deepest = max(deepest, len(in_flight))
        plan = in_flight.popleft()
        tokens = u32([7] * int(plan.samples.sum()))
        output = scheduler.update(StepResult(step_id=plan.step_id, token_ids=tokens, execute_us=step_us))
        pacing.ran(step_us)
        for request in output.requests:
            if request.constraint is not None:
                scheduler.allow(request, MASK)
        if step == 0:
            for request in requests:
                if request.constraint is not None and request.is_blocked:
                    scheduler.allow(request, MASK)
    return deepest


_LIMITS = EngineLimits(
    num_blocks=64,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_model_len=60,
    vocab_size=50,
)
_SETTINGS = CoreSettings(enable_prefix_caching=False)


@pytest.mark.parametrize("step_us", [SHORT_STEP_US, LONG_STEP_US])
def test_constrained_requests_alone_take_every_step_together(step_us: int) -> None:
    requests = [_request(True), _request(True), _request(True)]
    assert _run(requests, step_us) == 1
    assert min(request.num_output_tokens for request in requests) >= NUM_STEPS - 3


@pytest.mark.parametrize("step_us", [SHORT_STEP_US, LONG_STEP_US])
def test_free_requests_never_wait_for_masks(step_us: int) -> None:
    free, constrained = _request(False), _request(True)
    assert _run([constrained, free], step_us) == 2
    assert free.num_output_tokens >= NUM_STEPS - 1
    assert NUM_STEPS // 2 - 1 <= constrained.num_output_tokens <= NUM_STEPS // 2 + 1


@pytest.mark.parametrize("step_us", [SHORT_STEP_US, LONG_STEP_US])
def test_free_requests_alone_are_always_planned_ahead(step_us: int) -> None:
    requests = [_request(False), _request(False)]
    assert _run(requests, step_us) == 2


def test_a_grammar_that_is_being_compiled_holds_up_nobody() -> None:
    scheduler, pacing = Scheduler(_LIMITS, _SETTINGS), Pacing()
    pacing.ran(LONG_STEP_US)
    scheduler.add(_request(True))
    assert scheduler.schedule() is not None  # its prompt, but for the last token
    assert not pacing.holds_back(scheduler)


def _ahead(pacing: Pacing, scheduler: Scheduler, now: float) -> float:
    """Seconds until the second step is planned, if the worker began with the first at 0."""
    pacing.began(0.0)
    return pacing.too_early(scheduler, now)


def test_the_next_step_is_planned_shortly_before_the_worker_needs_it() -> None:
    scheduler, pacing = Scheduler(_LIMITS, _SETTINGS), Pacing()
    scheduler.add(_request(False))
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(StepResult(plan.step_id, u32([7]), execute_us=LONG_STEP_US))
        pacing.ran(LONG_STEP_US)
    assert scheduler.schedule() is not None
    seconds = LONG_STEP_US * 1e-6
    assert 0.5 * seconds < _ahead(pacing, scheduler, 0.0) < 0.9 * seconds
    assert _ahead(pacing, scheduler, 0.9 * seconds) < 0
    assert _ahead(pacing, scheduler, 2 * seconds) < 0, "it takes longer than expected"
    before = _ahead(pacing, scheduler, 0.0)
    pacing.ran(LONG_STEP_US, launch_us=10_000)
    assert _ahead(pacing, scheduler, 0.0) == pytest.approx(before - 0.010), "the device must not run dry"
    for _ in range(100):
        pacing.ran(LONG_STEP_US, launch_us=300)
    assert _ahead(pacing, scheduler, 0.0) > before - 0.001, "launches that were slow once are forgotten"


def test_where_prompts_fill_the_steps_nothing_is_waited_for() -> None:
    scheduler, pacing = Scheduler(replace(_LIMITS, max_num_batched_tokens=4), _SETTINGS), Pacing()
    scheduler.add(_request(False))
    waits = []
    for step in range(9):
        if step == 3:
            scheduler.add(_request(False))
            scheduler.add(_request(False))
        plan = scheduler.schedule()
        assert plan is not None
        pacing.began(0.0)
        waits.append(pacing.too_early(scheduler, 0.0) > 0)
        tokens = u32([7] * int(plan.samples.sum()))
        scheduler.update(StepResult(plan.step_id, tokens, execute_us=LONG_STEP_US))
        pacing.ran(LONG_STEP_US)
    # Nothing is known at first. Beside decodes two prompts of 3 tokens fill two steps of 4 and begin one.
    assert waits == [False, True, True, False, False, True, True, True, True]


def test_short_steps_and_the_first_ones_are_planned_ahead_at_once() -> None:
    scheduler, pacing = Scheduler(_LIMITS, _SETTINGS), Pacing()
    assert _ahead(pacing, scheduler, 0.0) <= 0, "nothing is in flight"
    scheduler.add(_request(False))
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        assert _ahead(pacing, scheduler, 0.0) <= 0
        scheduler.update(StepResult(plan.step_id, u32([7]), execute_us=SHORT_STEP_US // 2))
        pacing.ran(SHORT_STEP_US // 2)


def test_who_comes_during_a_step_is_in_the_next_one() -> None:
    service = SimulatedService(
        replace(_LIMITS, num_blocks=4096, max_model_len=1000),
        lambda work: 20e-3 + 1e-4 * work.num_prompt,
        _SETTINGS,
    )
    service.add("stream", 20, 500)
    for _ in range(30):
        service.step()
    begins = service.now
    service.arrivals.append((begins + 0.010, lambda: service.add("newcomer", 20, 5)))
    service.step()
    ends = service.now
    service.step()
    assert service.times["newcomer"] == [service.now]
    assert begins + 0.010 < ends
