"""The scheduler's gRPC service: streams in front of the driver."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc

from engine.dispatch.facts import WorkerFacts
from pagewire.base.errors import (
    Code,
    DeadlineExceeded,
    InvalidRequest,
    PagewireError,
    Unavailable,
    Unsupported,
)
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc
from pagewire.telemetry.context import of_traceparent
from pagewire.wire.ended_messages import error_in
from pagewire.wire.sampling_messages import given_fields
from pagewire.wire.sampling_params import SamplingParams
from scheduler.request import EndReason, Request
from scheduler.serve.adapters import adapter_message
from scheduler.serve.driver import EngineDriver
from scheduler.serve.intake import make_request
from scheduler.serve.observation import Observer
from scheduler.serve.outbox import Outbox, Ticket

logger = logging.getLogger(__name__)

_TEXT_FIELDS = ("stop", "include_stop_str_in_output", "skip_special_tokens", "bad_words")
_LAST_WRITE_SECONDS = 1.0
_OBSERVE_SECONDS = (0.1, 0.5, 10.0)
"""Between two messages of Observe: at least, by default, at most."""
# Parameters that only frontends serve, and their neutral values.
_FRONTEND_FIELDS = {"n": 1, "best_of": 1, "beam_search": None, "prompt_logprobs": None}


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """See protos/pagewire/scheduler/v1/scheduler.proto."""

    def __init__(self, driver: EngineDriver) -> None:
        self._driver = driver

    async def Connect(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """One frontend's stream."""
        connection = Connection(self._driver)
        reader = asyncio.create_task(connection.read(request_iterator))
        writer = asyncio.create_task(connection.write(context))
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            connection.close()
            # If a write is cancelled midway, gRPC does not send the status after it.
            await asyncio.wait((writer,), timeout=_LAST_WRITE_SECONDS)
            writer.cancel()
        try:
            for task in done:
                task.result()
        except InvalidRequest as error:
            await context.abort(_status(error.code), error.message)

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """One token-level request."""
        connection = Connection(self._driver)
        try:
            connection.submit(_as_submit(request, context))
            while True:
                for message in await connection.outbox.take():
                    for event in _events(message.deltas):
                        yield event
                        if event.HasField("ended"):
                            return
        except PagewireError as error:
            await context.abort(_status(error.code), error.message)
        finally:
            connection.close()

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelResponse:
        """Facts about the model."""
        model = self._driver.model()
        if not model.ready:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no engine is attached")
        return model

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        """Queue lengths and memory use."""
        return self._driver.load()

    async def GetMetrics(  # noqa: N802
        self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricsResponse:
        """Prometheus text."""
        return pb.GetMetricsResponse(exposition=await self._driver.metrics.exposition())

    async def GetTimeline(  # noqa: N802
        self, request: pb.GetTimelineRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTimelineResponse:
        """What happened to a request."""
        parts = self._driver.timelines.find(request.client, request.request_id)
        if not parts:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id!r} is known")
        return pb.GetTimelineResponse(parts=parts)

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.LoadAdapterResponse:
        """Loads an adapter on all workers."""
        try:
            self._driver.require_runtime_lora()
            entry = await self._driver.adapters.load(request.name, request.path, in_place=request.in_place)
        except PagewireError as error:
            await context.abort(_status(error.code), error.message)
        return pb.LoadAdapterResponse(adapter=adapter_message(entry))

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        """Serves an adapter no more."""
        try:
            self._driver.require_runtime_lora()
            await self._driver.adapters.unload(request.name)
        except PagewireError as error:
            await context.abort(_status(error.code), error.message)
        return pb.UnloadAdapterResponse()

    async def Observe(  # noqa: N802
        self, request: pb.ObserveRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ObserveResponse]:
        """The state, again and again."""
        least, default, most = _OBSERVE_SECONDS
        interval = min(max(least, request.interval or default), most)
        driver, observer = self._driver, Observer()
        with driver.observed_by(observer):
            while True:
                yield observer.take(driver.core, driver.load(), driver.metrics)
                await asyncio.sleep(interval)


class Connection:
    """One stream's open requests and its outbox."""

    def __init__(self, driver: EngineDriver) -> None:
        self._driver = driver
        self._requests: dict[int, Request] = {}
        self._last_handle = 0
        self.outbox = Outbox()

    async def read(self, messages: AsyncIterator[pb.ConnectRequest]) -> None:
        """Takes submissions and aborts until the frontend closes its side."""
        self._driver.subscribe(self.outbox)
        async for message in messages:
            if message.HasField("submit"):
                self._try_submit(message.submit)
            elif message.HasField("abort"):
                self._abort(message.abort)
            elif message.HasField("watch_cache"):
                self._driver.watch_cache(self.outbox, self._requests.__len__)
            elif message.HasField("changes"):
                for abort in message.changes.aborts:
                    self._abort(abort)
                for submit in message.changes.submits:
                    self._try_submit(submit)

    async def write(self, context: grpc.aio.ServicerContext) -> None:
        """Writes the outbox's messages as fast as the frontend reads them."""
        while not self.outbox.is_closed:
            for message in await self.outbox.take():
                for ended in message.deltas.ended:
                    self._requests.pop(ended.handle, None)
                await context.write(message)

    def _take_handle(self, handle: int) -> None:
        """Checks that handles rise on a stream, so that none names two requests: otherwise the end of the
        first could be taken for the end of the second.

        Raises:
            InvalidRequest: the handle is not above the last one.
        """
        if handle <= self._last_handle:
            raise InvalidRequest(
                f"handle {handle} is not above {self._last_handle}, the last one; handles rise on a stream"
            )
        self._last_handle = handle

    def _abort(self, abort: pb.Abort) -> None:
        request = self._requests.pop(abort.handle, None)
        if request is not None:
            is_complete = abort.reason == pb.END_REASON_STOP
            self._driver.abort(request, EndReason.STOP if is_complete else EndReason.ABORT)

    def _try_submit(self, submit: pb.Submit) -> None:
        """Submits a request, or adds its refusal to the outbox."""
        self._take_handle(submit.handle)
        try:
            self.submit(submit)
        except PagewireError as error:
            self._driver.metrics.refused(error.code.name.lower())
            self.outbox.add_refused(submit.handle, error)
            self.outbox.flush(0)

    def submit(self, submit: pb.Submit) -> None:
        """Hands a request to the driver.

        Raises:
            PagewireError: the request is refused.
        """
        facts = self._facts()
        timeout = submit.timeout if submit.HasField("timeout") else None
        if timeout is not None and not timeout > 0:
            raise DeadlineExceeded("the request's deadline had passed when it arrived")
        ticket = Ticket(self.outbox, submit.handle, time.perf_counter(), received=submit.received)
        trace = b""
        if submit.traceparent:
            try:
                ticket.trace = of_traceparent(submit.traceparent).child()
                trace = ticket.trace.to_bytes()
            except ValueError as error:
                raise InvalidRequest(str(error), param="traceparent") from None
        if submit.resumed:
            ticket.note(ticket.submitted_at, "resumed")
        request = make_request(
            submit.request_id,
            submit.token_ids[:],  # a list, which is read twice as fast
            SamplingParams() if submit.pooling else SamplingParams(**given_fields(submit.sampling)),
            facts,
            num_prompt_tokens=submit.num_prompt_tokens,
            priority=submit.priority,
            client=submit.client,
            adapter_id=submit.adapter_id,
            owner=ticket,
            bad_words=[each.ids[:] for each in submit.bad_words],
            cache_salt=submit.cache_salt,
            pooling=submit.pooling,
            group=submit.request_id.removesuffix(f"-{submit.part}") if submit.part else submit.request_id,
            part=submit.part,
            trace=trace,
        )
        self._driver.submit(request, ticket, timeout, resumed=submit.resumed)
        self._requests[submit.handle] = request

    def _facts(self) -> WorkerFacts:
        if self._driver.facts is None:
            raise Unavailable("no engine is attached; try again later")
        return self._driver.facts

    def close(self) -> None:
        """Aborts the open requests and closes the outbox."""
        self._driver.unsubscribe(self.outbox, self._requests.values())
        self.outbox.close()


def _as_submit(request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.Submit:
    """Converts a direct client's request to the message that frontends send.

    Raises:
        Unsupported: it uses a parameter that only frontends serve.
    """
    given = given_fields(request.sampling)
    for field in _TEXT_FIELDS:
        if field in given:
            raise Unsupported(f"{field} works on text; this service knows tokens only", param=field)
    for field, neutral in _FRONTEND_FIELDS.items():
        if given.get(field, neutral) != neutral:
            raise Unsupported(
                f"{field} is more than one stream of tokens; InferenceService, at the frontends, serves it",
                param=field,
            )
    submit = pb.Submit(
        handle=1,
        request_id=request.request_id or uuid.uuid4().hex,
        token_ids=request.token_ids,
        sampling=request.sampling,
        priority=request.priority,
        client=request.client,
    )
    remaining = context.time_remaining()
    if remaining is not None and not math.isinf(remaining):
        submit.timeout = remaining
    return submit


def _events(deltas: pb.StepDeltas) -> list[pb.GenerateResponse]:
    """Converts the deltas of a stream with a single request to events.

    Raises:
        PagewireError: the request ended with an error.
    """
    events: list[pb.GenerateResponse] = []
    logprobs: dict[int, Any] = dict(zip(deltas.logprob_indices, deltas.logprobs, strict=True))
    for index, token_id in enumerate(deltas.token_ids):
        token = pb.Token(token_id=token_id, logprobs=logprobs.get(index))
        events.append(pb.GenerateResponse(token=token))
    for ended in deltas.ended:
        if ended.reason == pb.END_REASON_ERROR:
            raise error_in(ended)
        events.append(pb.GenerateResponse(ended=ended))
    return events


def _status(code: Code) -> grpc.StatusCode:
    return next(status for status in grpc.StatusCode if status.value[0] == code)
