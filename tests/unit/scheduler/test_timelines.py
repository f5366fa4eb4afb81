"""What the scheduler remembers of requests."""

from __future__ import annotations

import time
from array import array

from engine.dispatch.sampling import SamplingRecord
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from scheduler.request import EndReason, Request
from scheduler.serve.outbox import MAX_EVENTS, WORKER_LOST, Outbox, Ticket
from scheduler.serve.timelines import Timelines


def request(name: str, *, client: str = "key/user", part: int = 0) -> Request:
    ticket = Ticket(Outbox(), 1, time.perf_counter(), received=time.time() - 1)
    made = Request(name, array("I", [1, 2, 3]), 2, SamplingRecord(), max_total_tokens=9, owner=ticket)
    made.client, made.group, made.part = client, name, part
    return made


def ended(timelines: Timelines, made: Request) -> None:
    made.end(EndReason.STOP)
    timelines.ended(made, time.perf_counter())


def test_a_request_is_found_while_it_is_open_and_after() -> None:
    timelines = Timelines(10)
    made = request("a")
    timelines.opened(made)
    (found,) = timelines.find("key", "a")
    assert (found.num_prompt_tokens, found.num_output_tokens, found.HasField("ended")) == (2, 1, False)
    ended(timelines, made)
    (found,) = timelines.find("key", "a")
    assert found.received <= found.queued <= found.ended
    assert abs(found.ended - time.time()) < 5
    assert found.reason == pb.END_REASON_STOP


def test_another_client_does_not_find_it() -> None:
    timelines = Timelines(10)
    made = request("a")
    timelines.opened(made)
    assert timelines.find("other", "a") == []
    ended(timelines, made)
    assert timelines.find("other", "a") == []
    assert timelines.find("", "a") == []


def test_parts_are_found_together_and_in_order() -> None:
    timelines = Timelines(10)
    parts = [request("a", part=part) for part in (2, 0, 1)]
    for part in parts:
        timelines.opened(part)
    ended(timelines, parts[0])
    found = timelines.find("key", "a")
    assert [(each.part, each.HasField("ended")) for each in found] == [(0, False), (1, False), (2, True)]


def test_no_more_than_the_last_ones_are_kept() -> None:
    timelines = Timelines(3)
    for number in range(10):
        made = request(str(number))
        timelines.opened(made)
        ended(timelines, made)
    kept = [number for number in range(10) if timelines.find("key", str(number))]
    assert kept == [7, 8, 9]


def test_a_limit_of_0_keeps_nothing() -> None:
    timelines = Timelines(0)
    made = request("a")
    timelines.opened(made)
    assert timelines.find("key", "a") == []
    ended(timelines, made)
    assert timelines.find("key", "a") == []


def test_a_name_that_is_used_again_means_the_later_request() -> None:
    timelines = Timelines(10)
    first, second = request("a"), request("a")
    timelines.opened(first)
    timelines.opened(second)
    ended(timelines, first)
    (found,) = timelines.find("key", "a")
    assert not found.HasField("ended")
    ended(timelines, second)
    (found,) = timelines.find("key", "a")
    assert found.HasField("ended")
    parts = [request("b", part=part) for part in range(3)]
    for part in parts:
        timelines.opened(part)
        ended(timelines, part)
    assert len(timelines.find("key", "b")) == 3
    timelines.opened(request("b"))
    assert len(timelines.find("key", "b")) == 1


def test_events_are_told_up_to_a_limit() -> None:
    made = request("a")
    ticket = made.owner
    assert isinstance(ticket, Ticket)
    ticket.note(1.0, WORKER_LOST, "it died")
    for _ in range(2 * MAX_EVENTS):
        ticket.note(2.0, "preempted")
    timelines = Timelines(1)
    timelines.opened(made)
    (found,) = timelines.find("key", "a")
    assert len(found.events) == MAX_EVENTS
    assert (found.events[0].name, found.events[0].detail) == (WORKER_LOST, "it died")
    assert found.num_worker_losses == 1
