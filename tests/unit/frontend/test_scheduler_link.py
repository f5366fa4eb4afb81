"""What the frontend does with its stream when requests come and go and schedulers die."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from frontend.generation.open_request import OpenRequest, Submission, Wakeup
from frontend.replicas.links import SchedulerLinks
from frontend.scheduler_link import MAX_CHANGED_BYTES, MAX_CHANGES, SchedulerLink
from pagewire.base.errors import Unavailable
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend, until_ready
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, stop


async def test_request_goes_on_where_it_was_when_the_scheduler_is_replaced(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        stream = client.generate("abc", SamplingParams(max_tokens=9, seed=5), stream=True)
        first = asyncio.ensure_future(anext(stream))
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, b"xy", cached=2)
        assert (await first).text == "xy"

        await scheduler.stop()
        successor = await ScriptedScheduler(scheduler.target.removeprefix("unix:")).start()
        again = await successor.submitted()
        assert bytes(again.token_ids) == b"abcxy"
        assert again.num_prompt_tokens == 3
        assert again.sampling == submit.sampling
        await successor.say(again.handle, [*b"z", EOS], end=stop(EOS), cached=3)
        rest = [delta async for delta in stream]
        assert "".join(delta.text for delta in rest) == "z"
        assert rest[-1].usage == inference_pb2.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
        assert frontend.link.num_reconnects == 1
        await successor.stop()


async def test_requests_open_and_new_wait_for_the_successors_engine(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("abc"))
        await scheduler.submitted()
        await scheduler.stop()
        successor = ScriptedScheduler(scheduler.target.removeprefix("unix:"), ready=False)
        await successor.start()
        await successor.until(lambda scheduler: scheduler.num_streams == 1)
        assert successor.submits == []
        new = asyncio.ensure_future(client.generate("new"))
        successor.reply = b"done"
        await successor.attach_engine()
        assert (await asking).text == "done"
        assert (await new).text == "done"
        await successor.stop()


async def test_request_aborted_while_the_scheduler_was_away_is_not_resubmitted(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        kept, dropped = (asyncio.ensure_future(client.generate(text)) for text in ("keep", "drop"))
        await scheduler.submitted(2)
        await scheduler.stop()
        dropped.cancel()
        await asyncio.wait([dropped])
        successor = ScriptedScheduler(scheduler.target.removeprefix("unix:"))
        successor.reply = b"x"
        await successor.start()
        assert (await kept).text == "x"
        assert [bytes(submit.token_ids) for submit in successor.submits] == [b"keep"]
        await successor.stop()


async def test_open_requests_end_when_the_scheduler_stays_away(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    frontend = await start_frontend(reconnect_timeout=0.2)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("p"))
        await scheduler.submitted()
        await scheduler.stop()
        with pytest.raises(Unavailable, match=r"not back within 0\.2 s"):
            await asking
        with pytest.raises(Unavailable, match="not reachable"):
            await client.generate("p")


async def test_frontend_that_starts_first_waits_for_the_scheduler(tmp_path: Path) -> None:
    path = str(tmp_path / "late.sock")
    link = SchedulerLink(f"unix:{path}")
    await link.start()
    assert not link.ready
    await asyncio.sleep(0.1)
    scheduler = await ScriptedScheduler(path).start()
    ready = asyncio.Event()
    link.on_change(ready.set)
    await asyncio.wait_for(ready.wait(), 5)
    assert link.ready
    await link.stop()
    await scheduler.stop()


async def test_abort_of_an_unsent_submission_sends_neither(frontend, scheduler) -> None:
    await until_ready(frontend)
    sampling = inference_pb2.SamplingParams(max_tokens=1)
    first, second = (
        Submission(request_id="r", prompt_ids=[token_id], sampling=sampling) for token_id in (1, 2)
    )
    frontend.link.close(frontend.link.open(first, Wakeup()))
    kept = frontend.link.open(second, Wakeup())
    await scheduler.submitted()
    assert [submit.handle for submit in scheduler.submits] == [kept.handle]
    assert scheduler.aborts == []
    frontend.link.close(kept)
    await scheduler.aborted(kept.handle)


async def test_a_handle_is_used_once_on_a_stream_which_is_renewed_when_they_run_out(
    scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frontend.scheduler_link._LAST_HANDLE", 3)
    link = SchedulerLinks(scheduler.target)
    await link.start()
    assert await link.back_soon()
    sampling = inference_pb2.SamplingParams(max_tokens=9)

    def opened(token_id: int) -> OpenRequest:
        return link.open(Submission(request_id="r", prompt_ids=[token_id], sampling=sampling), Wakeup())

    first, second = opened(10), opened(20)
    await scheduler.submitted(2)
    await scheduler.say(second.handle, b"ab")
    link.close(first)
    await scheduler.aborted(1)
    await scheduler.say(1, b"old", end=pb.Ended(reason=pb.END_REASON_LENGTH))
    third = opened(30)
    await scheduler.until(lambda scheduler: scheduler.num_streams == 2 and len(scheduler.submits) == 5)
    sent = [(submit.handle, list(submit.token_ids), submit.resumed) for submit in scheduler.submits]
    assert sent[:3] == [(1, [10], False), (2, [20], False), (3, [30], False)]
    assert sent[3:] == [(1, [20, *b"ab"], True), (2, [30], True)]
    await scheduler.say(2, b"c", end=pb.Ended(reason=pb.END_REASON_LENGTH))
    await scheduler.say(1, b"d", end=pb.Ended(reason=pb.END_REASON_LENGTH))
    async with asyncio.timeout(5):
        while not (second.ended and third.ended):
            await asyncio.sleep(0.01)
    assert [bytes(request.output_ids) for request in (first, second, third)] == [b"", b"abd", b"c"]
    await link.stop()


@pytest.mark.parametrize("takes_changes", [True, False])
async def test_what_is_opened_together_is_sent_together_to_a_scheduler_that_takes_it(
    scheduler: ScriptedScheduler, takes_changes: bool
) -> None:
    scheduler.takes_changes = takes_changes
    link = SchedulerLinks(scheduler.target)
    await link.start()
    assert await link.back_soon()
    sampling = inference_pb2.SamplingParams(max_tokens=1)

    def opened(number: int, num_tokens: int = 1) -> OpenRequest:
        prompt_ids = [number] * num_tokens
        submission = Submission(request_id=f"r{number}", prompt_ids=prompt_ids, sampling=sampling)
        return link.open(submission, Wakeup())

    requests = [opened(number) for number in range(2 * MAX_CHANGES)]
    await scheduler.submitted(len(requests))
    assert scheduler.num_messages == (2 if takes_changes else len(requests))
    assert [submit.handle for submit in scheduler.submits] == [request.handle for request in requests]
    assert [list(submit.token_ids) for submit in scheduler.submits] == [[n] for n in range(len(requests))]
    for request in requests:
        link.close(request)
    last = opened(1)
    await scheduler.submitted(len(requests) + 1)
    assert scheduler.aborts == [request.handle for request in requests]
    assert scheduler.submits[-1].handle == last.handle
    scheduler.num_messages = 0
    for _ in range(3):
        opened(2, num_tokens=MAX_CHANGED_BYTES // 2)
    await scheduler.submitted(len(requests) + 4)
    assert scheduler.num_messages == (2 if takes_changes else 3)
    await link.stop()


async def test_tokens_of_one_step_reach_their_own_requests_in_order(frontend, scheduler) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        first, second = (asyncio.ensure_future(client.generate(text)) for text in ("1", "2"))
        handles = {}
        for count in (1, 2):
            submit = await scheduler.submitted(count)
            handles[bytes(submit.token_ids)] = submit.handle
        one, two = handles[b"1"], handles[b"2"]
        ended = [pb.Ended(handle=one, reason=pb.END_REASON_LENGTH)]
        unknown = 77
        await scheduler.send(pb.StepDeltas(handles=[one, two, unknown, one], token_ids=b"acxb", ended=ended))
        assert (await first).text == "ab"
        await scheduler.say(two, b"d", end=pb.Ended(reason=pb.END_REASON_LENGTH))
        assert (await second).text == "cd"


async def test_a_client_that_reads_log_probabilities_too_slowly_is_told_so(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frontend.generation.open_request.MAX_UNREAD_LOGPROBS", 64)
    scheduler.max_model_len = 100_000
    frontend = await start_frontend()
    entry = pb.TokenLogprobs(logprob=-1.0, top_ids=range(20), top_logprobs=[-1.0] * 20)
    # Of a fixed size, the room that flow control offers is soon filled by a client that does not read.
    async with grpc.aio.insecure_channel(frontend.target, options=(("grpc.http2.bdp_probe", 0),)) as channel:
        sampling = inference_pb2.SamplingParams(logprobs=20)
        request = inference_pb2.GenerateRequest(text="p", sampling=sampling)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        handle = (await scheduler.submitted()).handle
        num_said = 0
        async with asyncio.timeout(20):
            while handle not in scheduler.aborts:
                await scheduler.say(handle, b"abcdefg", logprobs=[entry] * 7)
                num_said += 7
        token_ids: list[int] = []

        async def read() -> None:
            async for message in call:
                assert len(message.delta.logprobs) == len(message.delta.token_ids)
                token_ids.extend(message.delta.token_ids)

        with pytest.raises(grpc.aio.AioRpcError, match="more slowly than log probabilities") as caught:
            await read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 64 < len(token_ids) <= num_said
        assert bytes(token_ids) == (b"abcdefg" * len(token_ids))[: len(token_ids)]


async def test_requests_leave_nothing_behind(frontend, scheduler) -> None:
    scheduler.reply = b"some text to stop in"
    async with AsyncClient(frontend.target, max_retries=0) as client:
        for number in range(200):
            params = SamplingParams(stop=["text"] if number % 2 else [])
            stream = client.generate("p", params, stream=True)
            async for _ in stream:
                if number % 3 == 0:
                    break
            await stream.aclose()
        await asyncio.wait_for(frontend.pipeline._idle.wait(), 5)
    assert frontend.link.links[0]._open == {}
    await scheduler.until(lambda scheduler: len(scheduler.submits) == 200)
    assert frontend.link.links[0]._unsent == {}
