"""How clients share an engine: who is served next, who waits, and who is refused."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import numpy as np
import pytest

from engine.dispatch.limits import EngineLimits
from engine.dispatch.sampling import SamplingRecord
from pagewire.base.errors import Overloaded
from scheduler.core import Scheduler
from scheduler.policy.shares import Group, Shares, Tally
from scheduler.request import EndReason, Request, Status
from scheduler.settings import CoreSettings
from tests.unit.scheduler.executor import MiniatureWorker
from tests.unit.scheduler.simulation import SimulatedService, changed, of_a_gpu

LIMITS = EngineLimits(
    num_blocks=4096,
    block_size=16,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_model_len=4096,
    vocab_size=50,
)
SETTINGS = CoreSettings(max_num_waiting=2000)


def service(**changes: object) -> SimulatedService:
    limits, settings = changed(LIMITS, SETTINGS, changes)
    return SimulatedService(limits, of_a_gpu, settings)


def order_of_admission(served: SimulatedService) -> list[str]:
    """Names in the order of their first tokens, when all is done."""
    while served.step():
        pass
    return sorted(served.times, key=lambda name: served.times[name][0])


def test_a_client_alone_is_served_in_the_order_of_priority_and_arrival() -> None:
    served = service(max_num_seqs=1)
    for index, priority in enumerate([0, 0, 1, -1, 0, -1, 1]):
        served.add(f"{index}", 20 + index, 3, priority=priority)
    assert order_of_admission(served) == ["3", "5", "0", "1", "4", "2", "6"]


def test_clients_with_requests_of_one_size_take_turns() -> None:
    served = service(max_num_seqs=1)
    for client in "aab":
        served.add(f"{client}{len(served.times)}", 20, 5, client=client)
    for index in range(3, 9):
        client = "ab"[index % 2]
        served.add(f"{client}{index}", 20, 5, client=client)
    order = order_of_admission(served)
    assert [name[0] for name in order[:8]] == ["a", "b"] * 4


def test_a_client_whose_requests_are_large_gets_fewer_of_them_through() -> None:
    served = service(max_num_seqs=1, enable_prefix_caching=False)
    for index in range(40):
        served.add(f"large{index}", 400, 4, client="large")
        served.add(f"small{index}", 90, 10, client="small")
    order = order_of_admission(served)[:30]
    assert 22 <= sum(name.startswith("small") for name in order) <= 26, "about four of five"


def test_priority_goes_before_fairness() -> None:
    served = service(max_num_seqs=1)
    for index in range(4):
        served.add(f"a{index}", 20, 5, client="a", priority=-1)
    served.add("b", 20, 5, client="b")
    assert order_of_admission(served)[-1] == "b"


def test_inventing_users_gains_nothing() -> None:
    served = service(max_num_seqs=1)
    for index in range(12):
        served.add(f"a{index}", 20, 5, client=f"a/user{index}")
        served.add(f"b{index}", 20, 5, client="b")
    order = order_of_admission(served)[:12]
    assert sum(name.startswith("a") for name in order) == 6


def test_the_users_of_a_client_share_what_it_gets() -> None:
    served = service(max_num_seqs=1)
    for index in range(12):
        served.add(f"x{index}", 20, 5, client="a/x")
    for index in range(3):
        served.add(f"y{index}", 20, 5, client="a/y")
    order = order_of_admission(served)
    assert [name[0] for name in order[1:7]].count("y") == 3


def test_what_was_served_while_nobody_else_waited_is_not_held_against_a_client() -> None:
    served = service(max_num_seqs=2)
    for index in range(20):
        served.add(f"early{index}", 50, 50, client="a")
    while served.core.num_waiting:
        served.step()
    for index in range(20):
        served.add(f"a{index}", 20, 5, client="a")
        served.add(f"b{index}", 20, 5, client="b")
    order = [name for name in order_of_admission(served) if not name.startswith("early")]
    assert 8 <= sum(name.startswith("a") for name in order[6:26]) <= 12


def newcomers_ttft(flood: int, **limits: object) -> list[float]:
    """Times to first token of a client that sends a prompt of 1,000 tokens every second, beside a flood of
    long answers."""
    served, rng = service(**limits), random.Random(7)
    for index in range(flood):
        served.add(f"flood{index}", rng.randrange(50, 150), rng.randrange(100, 900), client="flood")
    ttft = []
    for second in range(1, 60):
        arrival = second + rng.random()
        while served.now < arrival:
            if not served.step():
                served.now = arrival
        name = f"new{second}"
        served.add(name, 1000, 4, client="new")
        served.added[name] = arrival  # while the step went on that is over now
        ttft.append(served.first_token_after(name))
    if flood:
        assert served.core.num_waiting > 0, "the flood lasts"
    return ttft


@pytest.mark.parametrize("caching", [True, False])
def test_a_newcomer_is_served_at_once_though_a_flood_holds_every_row(caching: bool) -> None:
    limits = {"max_num_seqs": 16, "enable_prefix_caching": caching, "max_num_batched_tokens": 2048}
    alone = newcomers_ttft(0, **limits)
    beside = newcomers_ttft(1000, **limits)
    assert np.percentile(beside, 99) <= 2 * np.percentile(alone, 99)


def test_a_newcomer_is_served_at_once_though_a_flood_holds_the_memory() -> None:
    served = service(num_blocks=300, max_num_seqs=64, enable_prefix_caching=False)
    for index in range(100):
        served.add(f"flood{index}", 160, 400, client="flood")
    for _ in range(50):
        served.step()
    assert served.core.pool.num_free < 32
    assert served.core.num_waiting > 0
    served.add("new", 500, 4, client="new")
    assert served.first_token_after("new") < 0.1


def test_a_flood_takes_rows_from_nobody_who_has_no_more_than_it() -> None:
    served = service(max_num_seqs=4)
    for index in range(2):
        served.add(f"a{index}", 20, 300, client="a")
        served.add(f"b{index}", 20, 300, client="b")
    served.step()
    for index in range(50):
        served.add(f"flood{index}", 20, 300, client="a")
    for _ in range(100):
        served.step()
    assert served.core.counters.num_preemptions == 0


def test_a_full_queue_refuses_the_newest_of_the_client_that_fills_it() -> None:
    served = service(max_num_waiting=10, max_num_seqs=1)
    flood = [served.add(f"flood{index}", 20, 50, client="flood") for index in range(10)]
    with pytest.raises(Overloaded, match="10 requests are waiting"):
        served.add("flood10", 20, 50, client="flood")
    others = [served.add(f"other{index}", 20, 5, client="other") for index in range(5)]
    assert served.refused == flood[:4:-1]
    assert all(each.end_reason is EndReason.ERROR and "has the most" in each.error for each in served.refused)
    assert all(request.status is Status.WAITING for request in others)
    with pytest.raises(Overloaded):
        served.add("other5", 20, 5, client="other")
    assert len(served.refused) == 5, "it has half of the places"


def test_a_request_that_began_is_never_refused() -> None:
    served = service(max_num_waiting=4, max_num_seqs=2)
    begun = [served.add(f"flood{index}", 20, 50, client="flood") for index in range(2)]
    served.step()
    for index in range(4):
        served.add(f"more{index}", 20, 50, client="flood")
    served.core._preempt(served.core.running.pop())
    for index in range(2):
        served.add(f"new{index}", 20, 50, client=f"new{index}")
    assert all(request.end_reason is None for request in begun)
    assert len(served.refused) == 2


def test_a_tally_knows_who_has_the_most() -> None:
    group, tally, rng = Group(), Tally(), random.Random(3)
    shares = [group.member(str(index)) for index in range(20)]
    counts = dict.fromkeys(shares, 0)
    for _ in range(3000):
        share = rng.choice(shares)
        if counts[share] and rng.random() < 0.5:
            tally.remove(share)
            counts[share] -= 1
        else:
            tally.add(share)
            counts[share] += 1
        most = tally.most()
        assert (0 if most is None else counts[most]) == max(counts.values())
        assert len(tally) == sum(count > 0 for count in counts.values())


def test_clients_that_are_gone_are_forgotten() -> None:
    shares = Shares()
    lasting = shares.of("lasting")
    shares.begin_to_wait(lasting)
    shares.run(lasting, 10)
    shares.wait_no_more(lasting)
    for index in range(20_000):
        share = shares.of(f"client{index}/user")
        shares.begin_to_wait(share)
        shares.run(share, 10)
        shares.wait_no_more(share)
        shares.run_no_more(share)
    assert len(shares.clients._members) < 3000
    assert shares.of("lasting") is lasting
    shares.run_no_more(lasting)
    assert not shares.clients._members


def test_a_request_keeps_its_row_until_it_has_gained_a_token() -> None:
    """Else clients that take rows from each other may have each other begin again for ever."""
    limits = replace(LIMITS, max_num_seqs=2, max_num_batched_tokens=4)
    settings = replace(SETTINGS, enable_prefix_caching=False)
    scheduler, worker = Scheduler(limits, settings), MiniatureWorker(16, 50, 4, 2)

    def add(number: int, client: str) -> Request:
        prompt = array("I", [number] * 10)
        request = Request(f"r{number}", prompt, 10, SamplingRecord(), max_total_tokens=60, client=client)
        scheduler.add(request)
        return request

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(worker.execute(plan))

    rich = [add(0, "rich"), add(1, "rich")]
    while any(request.status is Status.WAITING for request in rich):
        step()
    newcomer = add(2, "newcomer")
    while newcomer.status is Status.WAITING:
        step()
    assert scheduler.counters.num_preemptions == 1
    (victim,) = [request for request in rich if request.num_preemptions]
    assert victim.num_output_tokens > 0
