"""Situations of the scheduler core that chance seldom brings about."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace
from typing import Any

from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import Pooling, SamplingRecord, u32
from pagewire.wire.block_hashes import root_hash
from pagewire.wire.sampling_params import StructuredOutput
from scheduler.core import Scheduler
from scheduler.request import EndReason, Request, Status
from scheduler.settings import CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker, continuation

VOCAB = 50


def test_a_chunk_that_finds_no_block_does_not_take_those_of_a_request_that_the_step_computes_already() -> (
    None
):
    limits = EngineLimits(
        num_blocks=8,
        block_size=3,
        max_num_seqs=2,
        max_num_batched_tokens=4,
        max_model_len=24,
        vocab_size=VOCAB,
    )
    settings = CoreSettings(enable_prefix_caching=False)
    scheduler, worker = Scheduler(limits, settings), MiniatureWorker(3, VOCAB, 4, 2)
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
    limits = EngineLimits(
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


def _request(
    prompt: list[int],
    max_tokens: int,
    *,
    priority: int,
    sampling: SamplingRecord = SamplingRecord(),  # noqa: B008
    **fields: Any,
) -> Request:
    return Request(
        "request",
        array("I", prompt),
        len(prompt),
        sampling,
        max_total_tokens=len(prompt) + max_tokens,
        priority=priority,
        **fields,
    )


LIMITS = EngineLimits(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    vocab_size=VOCAB,
)


def test_requests_that_come_together_share_the_full_blocks_of_their_prompt_from_the_first_step() -> None:
    scheduler, worker = Scheduler(LIMITS), MiniatureWorker(4, VOCAB, 64, 8)
    prompt = list(range(18))
    requests = [_request(prompt, 3, priority=0) for _ in range(5)]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.counts.tolist() == [18, 2, 2, 2, 2]
    assert scheduler.pool.num_used == 4 + 5  # four full blocks, and one for each request's own tokens
    assert len({tuple(request.block_ids[:4]) for request in requests}) == 1
    while plan is not None:
        scheduler.update(worker.execute(plan))
        plan = scheduler.schedule()
    assert all(request.token_ids.tolist() == prompt + continuation(prompt, 3, VOCAB) for request in requests)
    assert scheduler.pool.num_used == 0


def test_prompts_are_shared_only_between_requests_of_the_same_salt() -> None:
    scheduler = Scheduler(LIMITS)
    for salt in ("", "a", "b", "a"):
        scheduler.add(_request(list(range(9)), 3, priority=0, root_hash=root_hash(salt)))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.counts.tolist() == [9, 9, 9, 1]


def test_a_request_that_waits_for_its_first_mask_lets_those_behind_it_pass() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=2))
    blocked = _request([1], 3, priority=-1, constraint=StructuredOutput(regex="a"))
    scheduler.add(blocked)
    behind = [_request([2] * 9, 3, priority=0), _request([3] * 9, 3, priority=0)]
    for request in behind:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.counts.tolist() == [9, 9]
    assert scheduler.num_waiting == 1
    scheduler.abort(behind[0])
    scheduler.allow(blocked, u32([1, 0]))
    plan = scheduler.schedule()
    assert plan is not None
    assert blocked.status is Status.RUNNING
    column = plan.rows.tolist().index(blocked.row)
    assert plan.masks[column].tolist() == [1, 0]


def test_a_prompt_is_computed_but_for_its_last_token_while_the_mask_is_made() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(_request([1] * 9, 3, priority=0, constraint=StructuredOutput(regex="a")))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.counts.tolist(), plan.samples.tolist(), plan.masks) == ([8], [0], {})
    assert scheduler.schedule() is None


def test_a_step_computes_no_more_than_its_result_can_report() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=4096, num_blocks=1 << 12, max_model_len=4000)
    scheduler = Scheduler(limits)
    for token in range(3):
        scheduler.add(_request([token] * 1000, 3, priority=0, sampling=SamplingRecord(prompt_logprobs=0)))
    scheduler.add(_request([9] * 1000, 3, priority=0))
    most = limits.max_prompt_logprobs
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.counts[:3].tolist() == [1000, 1000, most - 2000]
    second = scheduler.schedule()
    assert second is not None
    assert 3000 - most in second.counts.tolist()
    scheduler = Scheduler(replace(limits, hidden_size=1 << 19))
    assert scheduler.limits.max_pooled == 2
    for token in range(4):
        scheduler.add(_request([token] * 5, 1, priority=0, sampling=SamplingRecord(pooling=Pooling.LAST)))
    plans = [scheduler.schedule() for _ in range(3)]
    ends = [
        sum(int(start + count) == 5 for start, count in zip(plan.starts, plan.counts, strict=True))
        for plan in plans
        if plan is not None
    ]
    assert ends == [2, 2]


def test_a_request_that_ends_ahead_of_the_steps_in_flight_leaves_only_what_its_blocks_hold() -> None:
    """Each of three steps in flight counts as computing a token more; the first samples all that are left."""
    limits = replace(LIMITS, max_tokens_per_step=4, block_size=3)
    scheduler, worker = Scheduler(limits), MiniatureWorker(3, VOCAB, 64, 8, generosity=lambda: 4)
    request, other = (_request([token], 3, priority=0) for token in (7, 8))
    scheduler.add(request)
    plans = [plan for plan in (scheduler.schedule() for _ in range(3)) if plan is not None]
    for plan in plans:
        scheduler.update(worker.execute(plan))
    assert request.end_reason is EndReason.LENGTH
    assert request.token_ids.tolist() == [7, *continuation([7], 3, VOCAB)]
    assert scheduler.pool.num_used == 0
    scheduler.add(other)
    while (step := scheduler.schedule()) is not None:
        scheduler.update(worker.execute(step))
    assert other.token_ids.tolist() == [8, *continuation([8], 3, VOCAB)]
