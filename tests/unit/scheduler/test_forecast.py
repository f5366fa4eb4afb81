"""Requests that would wait past their deadline are refused at once, and told when to come again."""

from __future__ import annotations

import pytest

from engine.dispatch.limits import EngineLimits
from pagewire.base.errors import Overloaded
from scheduler.settings import CoreSettings
from tests.unit.scheduler.simulation import SimulatedService, changed, of_a_gpu

LIMITS = EngineLimits(
    num_blocks=8192,
    block_size=16,
    max_num_seqs=16,
    max_num_batched_tokens=2048,
    max_model_len=16_384,
    vocab_size=50,
)
SETTINGS = CoreSettings(enable_prefix_caching=False)


def loaded(num_requests: int, prompt_tokens: int, max_tokens: int, **changes: object) -> SimulatedService:
    """A service that has run for a while, and has a queue."""
    limits, settings = changed(LIMITS, SETTINGS, changes)
    service = SimulatedService(limits, of_a_gpu, settings)
    for index in range(2 * num_requests):
        service.add(f"load{index}", prompt_tokens, max_tokens, client="load")
    while service.core.num_waiting > num_requests:
        service.step()
    return service


@pytest.mark.parametrize(
    ("num_requests", "prompt_tokens", "max_tokens"), [(40, 4000, 2), (60, 100, 200), (100, 1000, 50)]
)
def test_only_what_would_miss_its_deadline_is_refused(
    num_requests: int, prompt_tokens: int, max_tokens: int
) -> None:
    took = waits(num_requests, prompt_tokens, max_tokens)
    service = loaded(num_requests, prompt_tokens, max_tokens)
    num_waiting = service.core.num_waiting
    with pytest.raises(Overloaded, match="first token would come in about") as caught:
        service.add("late", 500, 5, client="load", timeout=took / 1.5)
    assert caught.value.retry_after is not None
    assert 1 <= caught.value.retry_after <= took
    assert service.core.num_waiting == num_waiting
    service.add("in time", 500, 5, client="load", timeout=took * 1.5)
    assert service.core.num_waiting == num_waiting + 1


def waits(num_requests: int, prompt_tokens: int, max_tokens: int) -> float:
    """How long a request takes to its first token, behind that load."""
    service = loaded(num_requests, prompt_tokens, max_tokens)
    service.add("measured", 500, 5, client="load")
    return service.first_token_after("measured")


def test_the_queue_of_others_makes_a_newcomer_miss_nothing() -> None:
    service = loaded(60, 100, 200)
    service.add("new", 500, 5, client="new", timeout=0.3)
    assert service.first_token_after("new") < 0.3


def test_without_a_deadline_nothing_is_refused_and_nothing_before_anything_was_measured() -> None:
    service = loaded(60, 100, 200)
    service.add("patient", 500, 5, client="load")
    fresh = SimulatedService(LIMITS, of_a_gpu, SETTINGS)
    for index in range(100):
        fresh.add(f"{index}", 500, 5, timeout=0.001)


def test_what_cannot_be_in_time_even_alone_is_not_told_to_come_again() -> None:
    service = SimulatedService(LIMITS, of_a_gpu, SETTINGS)
    service.add("first", 4000, 5)
    while service.step():
        pass
    service.add("hopeless", 16_000, 5, timeout=0.05)


def test_a_full_queue_says_when_to_come_again() -> None:
    service = loaded(60, 100, 200, max_num_waiting=120)
    while service.core.num_waiting < 120:
        service.add(f"more{service.core.num_waiting}", 100, 200, client="load")
    with pytest.raises(Overloaded) as caught:
        service.add("one too many", 100, 200, client="load")
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 2
