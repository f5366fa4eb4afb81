"""Situations of the scheduler core that chance seldom brings about."""

from __future__ import annotations

from array import array
from collections import deque

from engine.dispatch.records import SamplingRecord, StepPlan
from scheduler.core import Scheduler
from scheduler.limits import SchedulerLimits
from scheduler.request import EndReason, Request
from tests.unit.scheduler.executor import MiniatureWorker, continuation

VOCAB = 50


def test_a_chunk_that_finds_no_block_does_not_take_those_of_a_request_that_the_step_computes_already() -> (
    None
):
    limits = SchedulerLimits(
        num_blocks=8,
        block_size=3,
        max_num_seqs=2,
        max_num_batched_tokens=4,
        max_model_len=24,
        vocab_size=VOCAB,
        enable_prefix_caching=False,
    )
    scheduler, worker = Scheduler(limits), MiniatureWorker(3, VOCAB, 4, 2)
    decoding = _request([1] * 6, 12, priority=0)
    scheduler.add(decoding)
    in_flight: deque[StepPlan] = deque()
    prompt = [2] * 15
    chunked = _request(prompt, 3, priority=-1)
    num_left_out = 0
    for step in range(60):
        if step == 2:
            scheduler.add(chunked)
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append(plan)
            in_its_prompt = chunked.row >= 0 and chunked.num_output_tokens == 0
            num_left_out += in_its_prompt and plan.rows.tolist() == [decoding.row]
        if in_flight and (len(in_flight) == 2 or plan is None):
            scheduler.update(worker.execute(in_flight.popleft()))
    assert num_left_out > 0, "the situation did not come about"
    assert chunked.token_ids.tolist() == prompt + continuation(prompt, 3, VOCAB)
    assert decoding.token_ids.tolist() == [1] * 6 + continuation([1] * 6, 12, VOCAB)
    assert scheduler.pool.num_used == 0


def test_two_failures_end_a_request_only_if_it_gained_no_token_in_between() -> None:
    limits = SchedulerLimits(
        num_blocks=8,
        block_size=4,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        max_model_len=24,
        vocab_size=VOCAB,
    )
    scheduler, worker = Scheduler(limits), MiniatureWorker(4, VOCAB, 8, 1)
    request = _request([3] * 5, 6, priority=0)
    scheduler.add(request)
    for fail in (True, False, True, False, True, False, False, False, False):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(worker.execute(plan, fail=fail))
    assert request.token_ids.tolist() == [3] * 5 + continuation([3] * 5, 6, VOCAB)
    assert request.end_reason is EndReason.LENGTH


def _request(prompt: list[int], max_tokens: int, *, priority: int) -> Request:
    return Request(
        "request",
        array("I", prompt),
        len(prompt),
        SamplingRecord(),
        max_total_tokens=len(prompt) + max_tokens,
        priority=priority,
    )
