"""GET /v1/requests/{id}, over what the scheduler tells."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from frontend.caller import identity_of
from pagewire.client import AsyncClient
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler


async def get(frontend: RunningFrontend, request_id: str, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(frontend.url, headers=headers) as session:
        async with session.get(f"/v1/requests/{request_id}") as response:
            return response.status, await response.json()


async def test_a_finished_request_is_told_as_a_whole_and_by_events(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    first = pb.Timeline(
        received=100.0,
        queued=100.5,
        scheduled=101.0,
        first_token=103.0,
        last_token=107.0,
        ended=107.5,
        reason=pb.END_REASON_STOP,
        num_prompt_tokens=9,
        num_cached_tokens=4,
        num_output_tokens=5,
        num_preemptions=1,
        num_worker_losses=1,
        trace_id="t",
        events=[pb.TimelineEvent(time=104.0, name="worker lost", detail="it died")],
    )
    second = pb.Timeline()
    second.CopyFrom(first)
    second.part, second.scheduled, second.ended, second.reason = 1, 102.0, 109.0, pb.END_REASON_LENGTH
    scheduler.timelines["", "mine"] = [first, second]
    status, answer = await get(frontend, "chatcmpl-mine")
    assert status == 200
    assert (answer["id"], answer["status"], answer["trace_id"]) == ("mine", "finished", "t")
    assert (answer["first_scheduled"], answer["finished"], answer["parts"]) == (101.0, 109.0, 2)
    assert answer["durations"] == {"tokenize": 0.5, "queue": 0.5, "prefill": 2.0, "decode": 4.0, "total": 9.0}
    assert (answer["prompt_tokens"], answer["cached_tokens"], answer["output_tokens"]) == (18, 8, 10)
    assert (answer["preemptions"], answer["worker_restarts"]) == (2, 1)
    assert answer["finish_reasons"] == ["stop", "length"]
    times = [event["time"] for event in answer["events"]]
    assert times == sorted(times)
    assert [event["event"] for event in answer["events"] if event["part"] == 0] == [
        *("received", "queued", "scheduled", "first token", "worker lost", "last token", "finished")
    ]


async def test_a_request_of_which_a_part_runs_is_not_finished(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    ended = pb.Timeline(queued=1.0, scheduled=2.0, ended=3.0, reason=pb.END_REASON_STOP)
    scheduler.timelines["", "r"] = [ended, pb.Timeline(part=1, queued=1.0, scheduled=2.0, running=True)]
    _, answer = await get(frontend, "r")
    assert (answer["status"], answer["finished"], answer["first_token"]) == ("running", None, None)
    assert answer["durations"]["total"] is None
    scheduler.timelines["", "r"] = [pb.Timeline(queued=1.0)]
    _, answer = await get(frontend, "r")
    assert answer["status"] == "waiting"


async def test_only_the_key_that_sent_a_request_hears_of_it(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(api_keys=("one", "two"))
    scheduler.timelines[identity_of(b"one"), "r"] = [pb.Timeline(queued=1.0)]
    assert (await get(frontend, "r", "one"))[0] == 200
    status, answer = await get(frontend, "r", "two")
    assert status == 404
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", "id")
    assert answer["error"]["code"] == "not_found"
    assert (await get(frontend, "r"))[0] == 401


async def test_the_scheduler_is_told_when_a_request_came_and_why_it_was_ended(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with AsyncClient(frontend.target) as client:
        answering = asyncio.create_task(client.generate("p", SamplingParams(stop=["b"])))
        submit = await scheduler.submitted()
        assert submit.received > 1e9
        assert submit.traceparent == ""  # nothing is traced
        await scheduler.say(submit.handle, list(b"ab"), cached=0)
        await answering
    await scheduler.aborted(submit.handle)
    assert scheduler.abort_reasons == [pb.END_REASON_STOP]
