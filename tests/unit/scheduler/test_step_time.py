"""What the scheduler learns of its steps' times, and how it keeps to a target with that."""

from __future__ import annotations

import itertools
import random
from array import array

import numpy as np
import pytest

from engine.dispatch.limits import EngineLimits
from engine.dispatch.sampling import SamplingRecord
from scheduler.core import Scheduler
from scheduler.policy.step_time import PromptTime, StepTimes, StepWork, context_of
from scheduler.request import Request
from scheduler.settings import CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker
from tests.unit.scheduler.simulation import Cost, SimulatedService, of_a_gpu

VOCAB = 50


def work_of(num_decodes: int, chunk: int, start: int = 0) -> StepWork:
    work = StepWork(num_decodes, num_decodes * 500)
    if chunk:
        work.add(start, chunk)
    return work


def learned(cost: Cost, rng: random.Random, noise: float = 0.05) -> StepTimes:
    times = StepTimes()
    for _ in range(100):
        work = work_of(rng.randrange(1, 64), rng.choice([0, 16, 128, 512, 2048]), rng.randrange(0, 8000))
        times.observe(work, cost(work) * (1 + rng.uniform(-noise, noise)))
    return times


def test_times_of_steps_never_seen_are_predicted_from_those_that_were() -> None:
    times = learned(of_a_gpu, random.Random(1))
    for work in (work_of(7, 0), work_of(32, 300, 4000), work_of(1, 1000, 100), work_of(60, 2000, 7000)):
        assert times.predict(work) == pytest.approx(of_a_gpu(work), rel=0.1)


def test_a_step_that_compiled_for_a_minute_changes_next_to_nothing() -> None:
    rng = random.Random(2)
    times = learned(of_a_gpu, rng)
    for chunk in (0, 16, 512, 2048):
        times.observe(work_of(20, chunk), 60.0)
    work = work_of(32, 300, 4000)
    assert times.predict(work) == pytest.approx(of_a_gpu(work), rel=0.15)


def test_a_machine_that_becomes_slower_is_learned_anew() -> None:
    rng = random.Random(3)
    times = learned(of_a_gpu, rng)
    for _ in range(200):
        work = work_of(rng.randrange(1, 64), rng.choice([0, 16, 512]), rng.randrange(0, 8000))
        times.observe(work, 3 * of_a_gpu(work))
    work = work_of(32, 300, 4000)
    assert times.predict(work) == pytest.approx(3 * of_a_gpu(work), rel=0.1)


def test_steps_without_prompts_do_not_make_it_forget_what_prompts_cost() -> None:
    times = learned(of_a_gpu, random.Random(4))
    for _ in range(10_000):
        times.observe(work_of(20, 0), of_a_gpu(work_of(20, 0)))
    work = work_of(20, 512)
    assert times.predict(work) == pytest.approx(of_a_gpu(work), rel=0.1)


def test_prompts_get_what_time_the_decodes_leave_and_never_nothing() -> None:
    times = learned(of_a_gpu, random.Random(5), noise=0.0)
    decodes = work_of(20, 0)
    time = PromptTime(times, decodes, 0.02, 16)
    count = time.fit(4000, 8000)
    with_chunk = StepWork(20, decodes.decode_context, count, context_of(4000, count))
    assert 0.018 < of_a_gpu(with_chunk) <= 0.0205
    time.spend(4000, count)
    assert time.fit(0, 8000) < 32
    assert time.is_short
    crowded = PromptTime(times, decodes, 0.001, 16)
    assert crowded.fit(4000, 8000) == 16
    crowded.spend(4000, 16)
    assert crowded.fit(0, 100) == 0


def test_before_anything_is_known_prompts_grow_step_by_step() -> None:
    times, chunks = StepTimes(), []
    for _ in range(8):
        work = work_of(20, 0)
        count = PromptTime(times, work, 0.05, 16).fit(0, 8000)
        chunks.append(count)
        work.add(0, count)
        times.observe(work, of_a_gpu(work))
    assert chunks[0] == 64
    assert all(later <= 2 * sooner for sooner, later in itertools.pairwise(chunks))
    assert chunks[-1] > 1000


LIMITS = EngineLimits(
    num_blocks=4096,
    block_size=16,
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    max_model_len=16_384,
    vocab_size=VOCAB,
)
SETTINGS = CoreSettings(enable_prefix_caching=False, target_itl=0.015)


def gaps(times: list[float]) -> list[float]:
    return np.diff(times).tolist()


def test_streams_keep_their_pace_while_long_prompts_arrive() -> None:
    rng = random.Random(6)
    service = SimulatedService(LIMITS, lambda work: of_a_gpu(work) * rng.uniform(0.97, 1.03), SETTINGS)
    streams = [service.add(f"s{i}", 32, 2000) for i in range(20)]
    for _ in range(200):
        service.step()
    alone = np.percentile([gap for i in range(20) for gap in gaps(service.times[f"s{i}"])[5:]], 99)
    began = {f"s{i}": len(service.times[f"s{i}"]) for i in range(20)}
    for prompt in range(8):
        service.add(f"p{prompt}", 8000, 1)
        for _ in range(100):
            service.step()
    disturbed = [gap for name, first in began.items() for gap in gaps(service.times[name][first:])]
    assert all(request.end_reason is None for request in streams)
    assert all(service.times[f"p{prompt}"] for prompt in range(8)), "the prompts were computed meanwhile"
    assert np.percentile(disturbed, 99) <= 1.5 * alone
    assert service.core.counters.num_short_steps > 50


def test_a_prompt_gets_the_whole_budget_when_no_stream_waits() -> None:
    service = SimulatedService(LIMITS, of_a_gpu, SETTINGS)
    service.add("p", 8000, 1)
    for _ in range(4):
        assert service.step()
    assert service.times["p"], "in four steps of 2048 tokens at most"


def test_a_target_that_decodes_alone_exceed_starves_no_prompt() -> None:
    limits = EngineLimits(
        num_blocks=64,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_model_len=512,
        vocab_size=VOCAB,
    )
    service = SimulatedService(limits, of_a_gpu, CoreSettings(target_itl=1e-6))
    service.add("s", 4, 400)
    service.step()
    service.add("p", 320, 1)
    steps = 0
    while not service.times["p"]:
        assert service.step()
        steps += 1
    assert steps <= 320 // 16 + 4


def test_plans_within_a_target_are_plans_a_worker_can_run() -> None:
    service = Scheduler(LIMITS, SETTINGS)
    worker = MiniatureWorker(16, VOCAB, 2048, 32)
    for length in (5, 40, 300):
        prompt = array("I", [1] * length)
        service.add(Request("r", prompt, length, SamplingRecord(), max_total_tokens=length + 30))
        for _ in range(5):
            if (plan := service.schedule()) is not None:
                result = worker.execute(plan)
                result.execute_us = 14_000 + 20 * int(plan.counts.sum())
                service.update(result)
