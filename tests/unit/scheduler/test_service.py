"""The scheduler process's service over gRPC, driving a miniature worker through real dispatch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.dispatch.control import SchedulerGone, WorkerEndpoint, WorkerSession
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import StepPlan, StepResult
from engine.dispatch.sampling import u32
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.serve import server as server_module
from scheduler.serve.server import SchedulerServer
from tests.unit.scheduler.executor import MiniatureWorker, continuation

VOCAB = 50
FACTS = WorkerFacts(
    model="miniature",
    limits=EngineLimits(
        vocab_size=VOCAB,
        max_model_len=128,
        block_size=4,
        num_blocks=64,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        hidden_size=64,
    ),
    eos_token_ids=(49,),
    dtype="none",
    device="none",
)


def soon(session: WorkerSession) -> StepPlan | None:
    """The next plan, if it comes within some milliseconds."""
    for _ in range(20):
        if (plan := session.next_plan(block=False)) is not None:
            return plan
        time.sleep(0.001)
    return None


class WorkerThread:
    """Serves schedulers with a miniature worker until closed.

    Attributes:
        step_seconds: how long each step takes.
        fail_steps: how many of the next steps fail.
        leave_at: leaves the scheduler, as if killed, when it is to run this many more steps.
        deadly: leaves when it is given a request with this token.
        lose_device: says with the next step that it was the last.
        may_serve: unset, it answers no scheduler that comes.
        rows_by_step: the rows that each step computed.
        pieces_ahead: what it has left to do ahead; each piece takes `piece_seconds`.
        num_plans_ahead: how many plans had it do a piece.
    """

    def __init__(self, path: Path, facts: WorkerFacts = FACTS) -> None:
        self.facts = facts
        self.step_seconds = 0.0
        self.fail_steps = 0
        self.leave_at = -1
        self.deadly = -1
        self.lose_device = False
        self.may_serve = threading.Event()
        self.may_serve.set()
        self.num_sessions = 0
        self.pieces_ahead, self.piece_seconds, self.num_plans_ahead = 0, 0.0, 0
        self.rows_by_step: list[list[int]] = []
        self._endpoint = WorkerEndpoint(path)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed:
            self.may_serve.wait()
            session = self._endpoint.accept(self.facts)
            self.num_sessions += 1
            worker = MiniatureWorker(4, VOCAB, FACTS.limits.max_num_batched_tokens, FACTS.limits.max_num_seqs)
            doomed = None
            try:
                while self.leave_at != 0:
                    plan = doomed or session.next_plan(block=True)
                    assert plan is not None
                    if plan.work_ahead:
                        time.sleep(self.piece_seconds)
                        self.num_plans_ahead += 1
                        self.pieces_ahead -= 1
                        result = StepResult(plan.step_id, u32([]), more_ahead=self.pieces_ahead > 0)
                        session.send_result(result)
                        continue
                    self.rows_by_step.append(plan.rows.tolist())
                    time.sleep(self.step_seconds)
                    if any(self.deadly in new.token_ids for new in plan.new_requests):
                        break
                    if self.lose_device:
                        self.lose_device = False
                        error = "CUDA error: misaligned address"
                        session.send_result(StepResult(plan.step_id, u32([]), error=error, is_last=True))
                        break
                    fails, doomed = doomed is not None, None
                    if self.fail_steps and not fails:
                        self.fail_steps -= 1
                        fails, doomed = True, soon(session)  # what was planned on top of it
                    result = worker.execute(plan, fail=fails)
                    result.execute_us = int(self.step_seconds * 1e6)
                    session.send_result(result)
                    self.leave_at -= 1
                self.leave_at = -1
            except SchedulerGone:
                pass
            session.close()

    def close(self) -> None:
        self._closed = True


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerThread]:
    worker = WorkerThread(tmp_path / "worker.sock")
    yield worker
    worker.close()


@pytest.fixture
async def stub(
    worker: WorkerThread, tmp_path: Path
) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceStub]:
    async with served(tmp_path) as stub:
        yield stub


@asynccontextmanager
async def served(tmp_path: Path, **options: Any) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceStub]:
    """A scheduler over the worker at worker.sock."""
    address = f"unix:{tmp_path}/scheduler.sock"
    options = {"max_num_waiting": 3, **options}
    config = SchedulerConfig(listen=(address,), worker_socket=tmp_path / "worker.sock", **options)
    server = SchedulerServer(config)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        async with asyncio.timeout(10):
            while not await is_ready(stub):
                await asyncio.sleep(0.01)
        yield stub
    await server.stop()


async def is_ready(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> bool:
    try:
        return bool((await stub.GetModel(pb.GetModelRequest())).ready)
    except grpc.aio.AioRpcError:
        return False


def request(prompt: list[int], max_tokens: int, **sampling: object) -> pb.GenerateRequest:
    params = inference_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(token_ids=prompt, sampling=params)


def submit(
    handle: int, prompt: list[int], max_tokens: int, *, logprobs: int | None = None, **fields: object
) -> pb.ConnectRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    return pb.ConnectRequest(
        submit=pb.Submit(handle=handle, token_ids=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]
    )


class Frontend:
    """Speaks Connect and collects what comes, by handle."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
        self.call = stub.Connect()
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.ended: dict[int, pb.Ended] = {}
        self.prompt_logprobs: dict[int, list[float]] = {}
        self.pooled: dict[int, list[float]] = {}
        self.models: list[pb.GetModelResponse] = []

    async def until_ended(self, *handles: int) -> None:
        async with asyncio.timeout(20):
            while not self.ended.keys() >= set(handles):
                await self.receive()

    async def receive(self) -> None:
        message = await self.call.read()
        if message.HasField("model"):
            self.models.append(message.model)
        for told in message.deltas.prompt_logprobs:
            assert told.handle not in self.tokens, "the prompt's come first"
            so_far = self.prompt_logprobs.setdefault(told.handle, [])
            assert told.first == 1 + len(so_far)
            so_far += [entry.logprob for entry in told.logprobs]
        for state in message.deltas.pooled_states:
            assert state.handle not in self.pooled
            self.pooled[state.handle] = list(state.values)
        for handle, token in zip(message.deltas.handles, message.deltas.token_ids, strict=True):
            assert handle not in self.ended
            self.tokens.setdefault(handle, []).append(token)
        for index, entry in zip(message.deltas.logprob_indices, message.deltas.logprobs, strict=True):
            self.logprobs.setdefault(message.deltas.handles[index], []).append(entry.logprob)
        for ended in message.deltas.ended:
            assert ended.handle not in self.ended, "ended twice"
            self.ended[ended.handle] = ended


async def used_blocks(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> int:
    return int((await stub.GetLoad(pb.GetLoadRequest())).num_used_blocks)


async def test_generate_streams_tokens_and_one_end(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
    events = [event async for event in stub.Generate(request([1, 2, 3], 10))]
    tokens = [event.token.token_id for event in events[:-1]]
    assert tokens == continuation([1, 2, 3], 10, VOCAB)
    assert events[-1].ended.reason == pb.END_REASON_LENGTH
    assert events[-1].ended.num_output_tokens == 10
    assert await used_blocks(stub) == 0


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
async def test_a_batch_begins_when_it_is_full_or_somebody_has_waited_long_enough(
    worker: WorkerThread, tmp_path: Path, strategy: str
) -> None:
    delay = 0.3
    options = {"batching_strategy": strategy, "max_queue_delay_microseconds": round(delay * 1e6)}
    async with served(tmp_path, **options, max_num_waiting=10) as stub:
        frontend = Frontend(stub)
        began = time.perf_counter()
        for handle in (1, 2, 3):
            await frontend.call.write(submit(handle, [handle], 5))
        await frontend.until_ended(1, 2, 3)
        assert time.perf_counter() - began >= delay
        assert [len(rows) for rows in worker.rows_by_step] == [3] * 5
        began = time.perf_counter()
        for handle in (4, 5, 6, 7, 8):
            await frontend.call.write(submit(handle, [handle], 5))
        await frontend.until_ended(4, 5, 6, 7)
        assert time.perf_counter() - began < delay
        assert 8 not in frontend.tokens
        await frontend.until_ended(8)
        assert [len(rows) for rows in worker.rows_by_step] == [3] * 5 + [4] * 5 + [1] * 5
        for handle in range(1, 9):
            assert frontend.tokens[handle] == continuation([handle], 5, VOCAB)
        metrics = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
        assert f'pagewire:batching_info{{strategy="{strategy}"}} 1.0' in metrics
        assert "pagewire:batches_total 3.0" in metrics


async def test_one_request_at_a_time_is_all_of_its_completions_and_goes_on_with_another_worker(
    worker: WorkerThread, tmp_path: Path
) -> None:
    worker.leave_at = 3
    async with served(tmp_path, batching_strategy="none", max_num_waiting=10) as stub:
        frontend = Frontend(stub)
        changes = pb.Changes(
            submits=[
                submit(1, [1], 5, request_id="a").submit,
                submit(2, [2], 5, request_id="b").submit,
                submit(3, [1, 3], 5, request_id="a-1", part=1).submit,
            ]
        )
        await frontend.call.write(pb.ConnectRequest(changes=changes))
        await frontend.until_ended(1, 2, 3)
        assert frontend.tokens[3] == continuation([1, 3], 5, VOCAB)
        assert len(worker.rows_by_step[0]) == 2
        assert [len(rows) for rows in worker.rows_by_step[-5:]] == [1] * 5


@pytest.mark.parametrize(
    ("bad", "status", "message"),
    [
        (request([], 5), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (request([VOCAB], 5), grpc.StatusCode.INVALID_ARGUMENT, "token id 50"),
        (request([1] * 128, 5), grpc.StatusCode.INVALID_ARGUMENT, "at most 127"),
        (request([1], 5, temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature is -1"),
        (request([1], 5, stop_token_ids=[99]), grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
        (request([1], 5, stop=["x"]), grpc.StatusCode.UNIMPLEMENTED, "stop works on text"),
    ],
)
async def test_generate_refuses_with_a_typed_error(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
    bad: pb.GenerateRequest,
    status: grpc.StatusCode,
    message: str,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(bad):
            pass
    assert caught.value.code() is status
    assert message in str(caught.value.details())


async def test_a_deadline_and_a_cancel_free_the_blocks(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.05
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request([1], 100), timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    call = stub.Generate(request([1], 100))
    await anext(aiter(call))
    assert await used_blocks(stub) > 0
    call.cancel()
    async with asyncio.timeout(2):
        while await used_blocks(stub):
            await asyncio.sleep(0.01)


async def test_one_stream_carries_many_requests_and_their_refusals(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    frontend = Frontend(stub)
    for handle in range(1, 5):
        await frontend.call.write(submit(handle, [handle], 8))
    await frontend.call.write(submit(7, [VOCAB + 1], 8))
    await frontend.call.write(submit(8, [1], 8, timeout=-1.0))
    await frontend.until_ended(1, 2, 3, 4, 7, 8)
    assert frontend.models[0].model == "miniature"
    for handle in range(1, 5):
        assert frontend.tokens[handle] == continuation([handle], 8, VOCAB)
    assert frontend.ended[7].status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert frontend.ended[7].param == "prompt"
    assert frontend.ended[8].param == ""
    assert frontend.ended[8].status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_changes_are_taken_together(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.02
    frontend = Frontend(stub)
    bad = submit(3, [VOCAB + 1], 8).submit
    submits = [submit(handle, [handle], 3).submit for handle in (1, 2)]
    await frontend.call.write(pb.ConnectRequest(changes=pb.Changes(submits=[*submits, bad])))
    await frontend.until_ended(1, 2, 3)
    assert [len(rows) for rows in worker.rows_by_step] == [2, 2, 2]
    assert frontend.tokens == {handle: continuation([handle], 3, VOCAB) for handle in (1, 2)}
    assert frontend.ended[3].status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    await frontend.call.write(submit(4, [4], 100))
    while 4 not in frontend.tokens:
        await frontend.receive()
    changes = pb.Changes(submits=[submit(5, [5], 2).submit], aborts=[pb.Abort(handle=4), pb.Abort(handle=77)])
    await frontend.call.write(pb.ConnectRequest(changes=changes))
    await frontend.until_ended(5)
    assert frontend.tokens[5] == continuation([5], 2, VOCAB)
    assert 4 not in frontend.ended
    assert await used_blocks(stub) == 0


async def test_two_streams_get_their_own_tokens_and_log_probabilities(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    frontends = [Frontend(stub), Frontend(stub)]
    for handle in (1, 2):  # in turns, and every other one with log probabilities
        for number, frontend in enumerate(frontends):
            logprobs = 1 if (handle + number) % 2 else None
            await frontend.call.write(submit(handle, [10 * handle + number], 8, logprobs=logprobs))
    for number, frontend in enumerate(frontends):
        await frontend.until_ended(1, 2)
        for handle in (1, 2):
            tokens = continuation([10 * handle + number], 8, VOCAB)
            assert frontend.tokens[handle] == tokens
            expected = [-float(token) for token in tokens] if (handle + number) % 2 else None
            assert frontend.logprobs.get(handle) == expected


async def test_a_full_queue_refuses_with_resource_exhausted(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.05
    frontend = Frontend(stub)
    handles = list(range(1, 12))  # 4 rows and 3 places to wait
    for handle in handles:
        await frontend.call.write(submit(handle, [handle], 8))
    await frontend.until_ended(*handles)
    refused = [handle for handle in handles if frontend.ended[handle].reason == pb.END_REASON_ERROR]
    assert refused
    codes = {frontend.ended[handle].status for handle in refused}
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
    assert all(len(frontend.tokens[handle]) == 8 for handle in handles if handle not in refused)


async def test_output_sent_along_with_the_prompt_is_continued(
    stub: scheduler_pb2_grpc.SchedulerServiceStub,
) -> None:
    whole = continuation([5, 6], 20, VOCAB)
    frontend = Frontend(stub)
    await frontend.call.write(submit(1, [5, 6, *whole[:7]], 20, num_prompt_tokens=2))
    await frontend.until_ended(1)
    assert frontend.tokens[1] == whole[7:]


async def test_a_closed_stream_aborts_its_requests(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.02
    frontend, other = Frontend(stub), Frontend(stub)
    await frontend.call.write(submit(1, [1], 100))
    await other.call.write(submit(1, [2], 10))
    while 1 not in frontend.tokens:
        await frontend.receive()
    frontend.call.cancel()
    await other.until_ended(1)
    assert other.tokens[1] == continuation([2], 10, VOCAB)
    async with asyncio.timeout(2):
        while await used_blocks(stub):
            await asyncio.sleep(0.01)


async def test_a_lost_worker_is_replaced_and_streams_go_on_without_losing_or_repeating_a_token(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    worker.leave_at = 9
    for handle in range(1, 4):
        await frontend.call.write(submit(handle, [handle] * 10, 30))
    await frontend.until_ended(1, 2, 3)
    assert worker.num_sessions == 2
    for handle in range(1, 4):
        assert frontend.tokens[handle] == continuation([handle] * 10, 30, VOCAB)
    assert [model.ready for model in frontend.models][-2:] == [False, True]


async def test_what_is_sent_before_the_loss_is_known_waits_for_the_next_worker(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    worker.may_serve.clear()
    worker.leave_at = 3
    await frontend.call.write(submit(1, [1] * 10, 30))
    while await is_ready(stub):
        await asyncio.sleep(0.01)
    for handle in range(2, 5):
        await frontend.call.write(submit(handle, [handle] * 10, 30))
    await frontend.until_ended(4)
    assert frontend.ended[4].status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    worker.may_serve.set()
    await frontend.until_ended(1, 2, 3)
    for handle in range(1, 4):
        assert frontend.tokens[handle] == continuation([handle] * 10, 30, VOCAB)
    assert await used_blocks(stub) == 0


async def test_a_step_that_fails_once_is_recomputed_and_twice_is_an_error(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    worker.fail_steps = 1
    await frontend.call.write(submit(1, [3] * 5, 12))
    await frontend.until_ended(1)
    assert frontend.tokens[1] == continuation([3] * 5, 12, VOCAB)
    worker.fail_steps = 2
    await frontend.call.write(submit(2, [4] * 5, 12))
    await frontend.until_ended(2)
    assert frontend.ended[2].status == grpc.StatusCode.INTERNAL.value[0]
    assert "quarantined" in frontend.ended[2].error
    assert "the step failed" in frontend.ended[2].error
    assert await used_blocks(stub) == 0


async def test_a_request_that_kills_the_worker_is_quarantined_and_the_others_live(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    worker.deadly = 40
    worker.step_seconds = 0.01
    for handle, first in ((1, 1), (2, 2), (3, 40)):
        await frontend.call.write(submit(handle, [first, 5, 6], 25))
    await frontend.until_ended(1, 2, 3)
    assert frontend.ended[3].status == grpc.StatusCode.INTERNAL.value[0]
    assert frontend.ended[3].error.startswith("this request is quarantined: the engine failed 2 times")
    assert "the engine-worker died" in frontend.ended[3].error
    for handle in (1, 2):
        assert frontend.tokens[handle] == continuation([handle, 5, 6], 25, VOCAB)
    assert worker.num_sessions <= 4
    text = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
    assert "pagewire:requests_quarantined_total 1.0" in text
    assert await used_blocks(stub) == 0


async def test_a_device_that_fails_counts_once_and_its_error_is_told(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = Frontend(stub)
    worker.step_seconds = 0.01
    for handle in (1, 2):
        await frontend.call.write(submit(handle, [handle] * 5, 25))
    while not {1, 2} <= frontend.tokens.keys():
        await frontend.receive()
    worker.lose_device = True
    await frontend.until_ended(1, 2)
    for handle in (1, 2):
        assert frontend.tokens[handle] == continuation([handle] * 5, 25, VOCAB)
    assert worker.num_sessions == 2
    assert "detached: CUDA error: misaligned address" in caplog.text


async def test_health_metrics_and_load(stub: scheduler_pb2_grpc.SchedulerServiceStub, tmp_path: Path) -> None:
    async for _ in stub.Generate(request([1, 2, 3, 4, 5], 3)):
        pass
    text = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
    assert "pagewire:generation_tokens_total 3.0" in text
    assert 'pagewire:request_success_total{finished_reason="length"} 1.0' in text
    assert "pagewire:time_to_first_token_seconds_count 1.0" in text
    assert "pagewire:inter_token_latency_seconds_count 2.0" in text
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_requests_running, load.max_num_seqs, load.max_num_waiting) == (0, 4, 3)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/scheduler.sock") as channel:
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert check.status == health_pb2.HealthCheckResponse.SERVING


def test_sockets_are_private(tmp_path: Path) -> None:
    async def listen() -> int:
        config = SchedulerConfig(
            listen=(f"unix:{tmp_path}/s.sock",), worker_socket=tmp_path / "nobody.sock", max_num_waiting=3
        )
        server = SchedulerServer(config)
        await server.start()
        mode = (tmp_path / "s.sock").stat().st_mode & 0o777
        await server.stop()
        return mode

    assert asyncio.run(listen()) == 0o600


async def test_requests_that_were_let_in_before_are_not_refused_by_a_full_queue(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.02
    frontend = Frontend(stub)
    handles = list(range(1, 16))
    for handle in handles:
        await frontend.call.write(submit(handle, [handle], 8, resumed=True))
    await frontend.until_ended(*handles)
    assert all(frontend.tokens[handle] == continuation([handle], 8, VOCAB) for handle in handles)


async def test_a_handle_used_twice_ends_the_stream_that_did_it(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    worker.step_seconds = 0.02
    frontend = Frontend(stub)
    for _ in range(2):
        await frontend.call.write(submit(1, [1], 100))
    with pytest.raises(grpc.aio.AioRpcError, match="handle 1") as caught:
        await frontend.until_ended(1)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(2):
        while await used_blocks(stub):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("ended", [True, False], ids=["after its request ended", "after an abort"])
async def test_a_handle_names_one_request_of_a_stream_and_never_another(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread, ended: bool
) -> None:
    """What is under way for the first could be taken for the second's: a token, or the end."""
    worker.step_seconds = 0.02
    frontend = Frontend(stub)
    await frontend.call.write(submit(1, [1], 2 if ended else 100))
    if ended:
        await frontend.until_ended(1)
    else:
        while 1 not in frontend.tokens:
            await frontend.receive()
        await frontend.call.write(pb.ConnectRequest(abort=pb.Abort(handle=1)))
    await frontend.call.write(submit(1, [2], 100))
    with pytest.raises(grpc.aio.AioRpcError, match="handle 1 is not above 1") as caught:
        await frontend.until_ended(2)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(2):
        while await used_blocks(stub):
            await asyncio.sleep(0.01)


async def test_a_full_queue_makes_room_for_a_client_that_has_none_in_it(
    worker: WorkerThread, stub: scheduler_pb2_grpc.SchedulerServiceStub
) -> None:
    worker.step_seconds = 0.02
    flood, other = Frontend(stub), Frontend(stub)
    for handle in range(1, 5):  # all rows
        await flood.call.write(submit(handle, [handle] * 4, 20, client="key/flood"))
    async with asyncio.timeout(10):
        while (await stub.GetLoad(pb.GetLoadRequest())).num_requests_running < 4:
            await asyncio.sleep(0.01)
    for handle in range(5, 9):  # all places in the queue, and one more
        await flood.call.write(submit(handle, [handle] * 4, 20, client="key/flood"))
    await flood.until_ended(8)
    await other.call.write(submit(1, [9] * 4, 2, client="key/other"))
    await other.until_ended(1)
    await flood.until_ended(*range(1, 9))
    for handle, reason in ((8, "the most this server queues"), (7, "has the most of them")):
        ended = flood.ended[handle]
        assert ended.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert reason in ended.error
        assert ended.retry_after >= 1
    assert other.ended[1].reason == pb.END_REASON_LENGTH
    assert all(flood.ended[handle].reason == pb.END_REASON_LENGTH for handle in range(1, 7))
    exposition = (await stub.GetMetrics(pb.GetMetricsRequest())).exposition.decode()
    assert 'pagewire:request_refused_total{code="resource_exhausted"} 2.0' in exposition


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other weights"},
        {"eos_token_ids": (48,)},
        {"limits": replace(FACTS.limits, vocab_size=VOCAB + 1)},
    ],
    ids=["weights", "end of sequence", "vocabulary"],
)
async def test_streams_of_one_model_do_not_go_on_with_another(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread, changes: dict[str, Any]
) -> None:
    frontend = Frontend(stub)
    worker.leave_at = 5
    worker.facts = replace(FACTS, **changes)
    for handle in (1, 2):
        await frontend.call.write(submit(handle, [handle] * 6, 60))
    await frontend.until_ended(1, 2)
    for handle in (1, 2):
        assert frontend.ended[handle].status == grpc.StatusCode.UNAVAILABLE.value[0]
        assert "changed its model" in frontend.ended[handle].error
    await frontend.call.write(submit(3, [3], 5))
    await frontend.until_ended(3)
    assert frontend.ended[3].reason == pb.END_REASON_LENGTH


async def test_streams_go_on_with_a_copy_of_their_model_elsewhere(
    stub: scheduler_pb2_grpc.SchedulerServiceStub, worker: WorkerThread
) -> None:
    frontend = Frontend(stub)
    worker.leave_at = 5
    worker.facts = replace(FACTS, model="/moved/miniature")
    await frontend.call.write(submit(1, [1] * 6, 30))
    await frontend.until_ended(1)
    assert frontend.tokens[1] == continuation([1] * 6, 30, VOCAB)
    assert worker.num_sessions == 2


@pytest.mark.parametrize("method", ["update", "schedule"])
async def test_an_exception_in_a_callback_ends_the_scheduler_with_its_stack(
    worker: WorkerThread,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    """What the callback had half changed is in doubt, and nobody else notices that it hangs."""
    monkeypatch.setattr(server_module, "spare_what_is_loaded", lambda: None)
    address = f"unix:{tmp_path}/scheduler.sock"
    config = SchedulerConfig(listen=(address,), worker_socket=tmp_path / "worker.sock")
    serving = asyncio.create_task(server_module._serve(config))

    def fail(*arguments: object) -> None:
        raise KeyError("the core is broken")

    async with grpc.aio.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        async with asyncio.timeout(10):
            while not await is_ready(stub):
                await asyncio.sleep(0.01)
        monkeypatch.setattr(Scheduler, method, fail)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.Generate(request([1, 2, 3], 10)):
                pass
    assert await asyncio.wait_for(serving, 10) == 1
    assert "the core is broken" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_worker_that_has_work_to_do_ahead_does_it_piece_by_piece_while_nobody_comes(
    tmp_path: Path,
) -> None:
    worker = WorkerThread(tmp_path / "worker.sock", replace(FACTS, more_ahead=True))
    worker.pieces_ahead = 3
    async with served(tmp_path) as stub:
        async with asyncio.timeout(5):
            while worker.pieces_ahead:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert worker.num_plans_ahead == 3
        events = [event async for event in stub.Generate(request([1, 2, 3], 10))]
        assert [event.token.token_id for event in events[:-1]] == continuation([1, 2, 3], 10, VOCAB)
    worker.close()


async def test_a_busy_worker_does_a_piece_ahead_now_and_then(tmp_path: Path) -> None:
    worker = WorkerThread(tmp_path / "worker.sock", replace(FACTS, more_ahead=True))
    worker.pieces_ahead, worker.piece_seconds = 1000, 0.05
    async with served(tmp_path) as stub:
        began = worker.num_plans_ahead
        events = [event async for event in stub.Generate(request([1, 2, 3], 60))]
        assert len(events) == 61
        assert worker.num_plans_ahead - began <= 3
    worker.close()
