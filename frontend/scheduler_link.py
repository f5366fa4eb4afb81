"""The frontend's one stream to one scheduler; `frontend.replicas.links` has those to all.

Submissions and aborts go out, one StepDeltas message a step comes in and is spread over the open requests.
When the scheduler is lost, the link connects again and submits every open request once more with the
tokens generated so far; sampling is keyed by seed and position, so the continuation is the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import grpc

from frontend.generation.open_request import OpenRequest, Submission, Wakeup, ended_by_drain, ended_with
from pagewire.base.errors import DeadlineExceeded, Overloaded, Unavailable, from_code
from pagewire.base.tls import ClientTls
from pagewire.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

logger = logging.getLogger(__name__)

MAX_UNSENT = 4096
"""Submissions waiting to be written; beyond it new requests are refused."""

MAX_CHANGES = 16
MAX_CHANGED_BYTES = 65_536
"""Submissions and aborts in one message, and bytes after which nothing is added to it: while the scheduler
takes them in it does nothing else.
"""

_NOTHING = scheduler_pb2.Abort()
_WATCH_CACHE = scheduler_pb2.ConnectRequest(watch_cache=scheduler_pb2.WatchCache())

UNARY_TIMEOUT = 5.0
"""Seconds that GetLoad and GetMetrics may take."""

LOAD_TIMEOUT = 600.0
"""Seconds that an adapter may take to be fetched and read."""

_CHANNEL_OPTIONS = (
    # A scheduler that starts again listens within a second; an attempt costs some microseconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Links of one process (in a test) must not share a connection, nor its fate.
    ("grpc.use_local_subchannel_pool", 1),
    # A scheduler whose host died without a word is noticed within 15 seconds. The scheduler permits pings.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_RETRY_DELAYS = (0.05, 0.1, 0.2, 0.5, 1.0)
_LAST_HANDLE = 2**31
"""After this one the stream is renewed: handles are used once on a stream, and have 32 bits."""


class SchedulerLink:
    """Owns the stream, the open requests and what is waiting to be written.

    Everything runs on one event loop. `open` and `close` never wait: they only change what the writer
    will send, so that an abort costs its caller nothing and overtakes nothing.

    Attributes:
        name: what people and metrics call the scheduler.
        target: its gRPC address.
        number: its place among the frontend's schedulers.
        model: facts about the served model, from the last scheduler that told; None before the first.
        num_reconnects: how often the stream was lost and came back.
        failed: completes with the exception if the link itself breaks; it never does otherwise.
        refused: why it gets no request although it is there; empty if nothing is wrong.
        drained: whether it gets no new request because an operator said so.
        load_of_others: requests that run or wait there and are not this frontend's, as far as it has told.
        on_lost: called when the stream has ended, before anybody who listens to changes.
        on_cache: called with what changed in its prefix cache; None if that need not be known.
    """

    def __init__(
        self,
        target: str,
        *,
        name: str = "0",
        number: int = 0,
        host: str = "",
        reconnect_timeout: float = 30.0,
        tls: ClientTls | None = None,
    ) -> None:
        """Args:
        target: gRPC address of the scheduler.
        name, number: see above.
        host: the name that its certificate is for, if not the one in `target`.
        reconnect_timeout: seconds that open requests wait for a lost scheduler before they are ended.
        tls: how the scheduler is to prove who it is; None for a plain connection.

        Raises:
            ConfigError: a file of `tls` is wrong.
        """
        self.name, self.number, self.target = name, number, target
        self._credentials = None if tls is None else tls.credentials()
        self._options: tuple[tuple[str, int | str], ...] = _CHANNEL_OPTIONS
        if host:
            self._options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", host))
        self._reconnect_timeout = reconnect_timeout
        self.model: scheduler_pb2.GetModelResponse | None = None
        self.num_reconnects = 0
        self._channel: grpc.aio.Channel | None = None
        self._stub: scheduler_pb2_grpc.SchedulerServiceStub | None = None
        self._task: asyncio.Task[None] | None = None
        self._streaming = False
        self._engine_ready = False
        self._resubmit_needed = False
        self._give_up: asyncio.TimerHandle | None = None
        self._open: dict[int, OpenRequest] = {}
        self._unsent: dict[int, scheduler_pb2.Abort | None] = {}
        """Handle -> None for a submission, else an abort, in the order they are to be written."""
        self._has_unsent = asyncio.Event()
        self._next_handle = 1
        self.heard = asyncio.Event()
        self.refused = ""
        self.drained = False
        self.load_of_others = 0
        self.on_lost: Callable[[], None] = lambda: None
        self.on_cache: Callable[[scheduler_pb2.CacheChanges], None] | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def ready(self) -> bool:
        """Whether the scheduler is there and has an engine."""
        return self._streaming and self._engine_ready

    @property
    def takes_requests(self) -> bool:
        """Whether it is to get new requests."""
        return self._streaming and self._engine_ready and not (self.drained or self.refused)

    @property
    def connected(self) -> bool:
        """Whether the stream is open."""
        return self._streaming

    @property
    def num_open(self) -> int:
        """Requests of this frontend that it has."""
        return len(self._open)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever `ready` or `model` may have changed."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    async def start(self) -> None:
        """Starts connecting; returns at once."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self.target, options=self._options)
        else:
            self._channel = grpc.aio.secure_channel(self.target, self._credentials, options=self._options)
        self._stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._task = asyncio.create_task(self._run(), name="scheduler-link")
        self._task.add_done_callback(self._task_done)

    async def stop(self) -> None:
        """Ends the stream. Requests still open end with reason ABORT."""
        self.abort_all()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._give_up is not None:
            self._give_up.cancel()
        if self._channel is not None:
            await self._channel.close()

    def open(self, submission: Submission, wakeup: Wakeup) -> OpenRequest:
        """Submits a request; `wakeup` will tell of its news.

        Raises:
            Unavailable: no scheduler with an engine is connected.
            Overloaded: the scheduler takes submissions more slowly than they come.
        """
        if not self.ready:
            raise Unavailable(self.why_not_ready())
        if len(self._unsent) >= MAX_UNSENT:
            raise Overloaded(f"{MAX_UNSENT} submissions wait to be sent to the scheduler; try again later")
        request = OpenRequest(self._draw_handle(), submission, wakeup)
        self.adopt(request)
        return request

    def adopt(self, request: OpenRequest) -> None:
        """Submits a request that another link has released, with the tokens it has."""
        request.handle = self._draw_handle() if request.link is not None else request.handle
        request.link = self
        deadline = request.submission.deadline
        if deadline is not None:
            loop = asyncio.get_running_loop()
            request.timer = loop.call_at(deadline, self._expire, request)
        self._open[request.handle] = request
        self._send(request.handle)

    def release(self) -> list[OpenRequest]:
        """Gives away all open requests. If the scheduler is still there it is told that they have ended."""
        released = list(self._open.values())
        self._open = {}
        for request in released:
            if request.timer is not None:
                request.timer.cancel()
            self._abort(request)
        self._stop_waiting()
        return released

    def close(self, request: OpenRequest) -> None:
        """Ends the caller's interest in a request; the scheduler is told unless it already ended it."""
        if request.timer is not None:
            request.timer.cancel()
        if self._open.pop(request.handle, None) is not None:
            self._abort(request)

    def abort_all(self) -> None:
        """Ends every open request with reason ABORT, as at the end of a drain."""
        for request in list(self._open.values()):
            self._end_here(request, ended_by_drain())

    def why_not_ready(self) -> str:
        """For people: what is missing."""
        if not self._streaming:
            return "the scheduler is not reachable; try again shortly"
        return "no engine is attached to the scheduler yet; try again shortly"

    def why_no_requests(self) -> str:
        """For people: why it is to get no new requests; empty if it is."""
        if not self.ready:
            return self.why_not_ready().partition(";")[0]
        if self.refused:
            return "it serves another model than the others"
        return "drained" if self.drained else ""

    def _draw_handle(self) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        return handle

    def _expire(self, request: OpenRequest) -> None:
        self._end_here(request, ended_with(DeadlineExceeded("the request's deadline passed")))

    def _end_here(self, request: OpenRequest, ended: scheduler_pb2.Ended) -> None:
        """Ends a request for a reason found in the frontend."""
        if self._open.pop(request.handle, None) is not None:
            self._abort(request)
        request.end(ended)
        request.wakeup.tell()

    def _abort(self, request: OpenRequest) -> None:
        handle = request.handle
        if self._unsent.pop(handle, _NOTHING) is None:
            return  # the scheduler never heard of it
        reason = scheduler_pb2.END_REASON_STOP if request.is_complete else scheduler_pb2.END_REASON_ABORT
        self._send(handle, scheduler_pb2.Abort(handle=handle, reason=reason))

    def _send(self, handle: int, abort: scheduler_pb2.Abort | None = None) -> None:
        if not self._streaming:
            return  # open requests are submitted anew on the next stream, and aborted ones are not
        self._unsent[handle] = abort
        self._has_unsent.set()

    async def _run(self) -> None:
        """Keeps the stream, for as long as the frontend lives."""
        failures = 0
        while True:
            failures = 0 if await self._connect_once() else failures + 1
            await asyncio.sleep(_RETRY_DELAYS[min(failures, len(_RETRY_DELAYS) - 1)])

    async def _connect_once(self) -> bool:
        """Holds one stream from its first message to its end; whether it got that far.

        Until the scheduler can be reached this waits inside gRPC, which retries with its own back-off.
        """
        assert self._stub is not None
        call = self._stub.Connect(wait_for_ready=True)
        began = False
        try:
            message = await call.read()
            if message is not grpc.aio.EOF:
                began = True
                await self._hold(call, message)
            logger.warning("the scheduler closed the stream")
        except grpc.aio.AioRpcError as error:
            logger.warning("the stream to the scheduler ended: %s %s", error.code().name, error.details())
        finally:
            call.cancel()
        return began

    async def _hold(self, call: grpc.aio.StreamStreamCall, message: Any) -> None:
        """Reads and writes until the stream ends; `message` is the first one read."""
        self._stream_began()
        writer = asyncio.create_task(self._write(call), name="scheduler-link-writer")
        writer.add_done_callback(self._task_done)
        try:
            while message is not grpc.aio.EOF:
                self._receive(message)
                message = await call.read()
        finally:
            writer.cancel()
            self._stream_ended()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """Tells whoever waits for `failed` of a fault in this code, which unlike a lost stream is final."""
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """Writes what `_send` queued, in order, at the pace the scheduler reads. Ends the stream when its
        handles run out; what is open then goes on on the next one.
        """
        loop = asyncio.get_running_loop()
        try:
            if self.on_cache is not None:
                await call.write(_WATCH_CACHE)
            while self._next_handle <= _LAST_HANDLE:
                await self._has_unsent.wait()
                self._has_unsent.clear()
                while self._unsent:
                    await call.write(self._take_unsent(loop.time()))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            logger.debug("a write found the stream ended")  # the reader finds it too, and starts over

    def _take_unsent(self, now: float) -> scheduler_pb2.ConnectRequest:
        """The next message: what there is, up to a limit, so that requests opened together start together."""
        message = scheduler_pb2.ConnectRequest()
        if self.model is None or not self.model.takes_changes:
            handle = next(iter(self._unsent))
            abort = self._unsent.pop(handle)
            if abort is None:
                self._open[handle].submit_in(message.submit, now)
            else:
                message.abort.CopyFrom(abort)
            return message
        num_bytes = 0
        for handle in list(islice(self._unsent, MAX_CHANGES)):
            abort = self._unsent.pop(handle)
            if abort is not None:
                message.changes.aborts.append(abort)
                continue
            submit = message.changes.submits.add()
            self._open[handle].submit_in(submit, now)
            num_bytes += submit.ByteSize()
            if num_bytes > MAX_CHANGED_BYTES:
                break
        return message

    def _stream_began(self) -> None:
        self._streaming = True
        self._engine_ready = False
        self._unsent.clear()
        self._renumber()
        if self._resubmit_needed:
            self.num_reconnects += 1

    def _renumber(self) -> None:
        """Gives the open requests the first handles of a new stream."""
        self._open = dict(enumerate(self._open.values(), start=1))
        for handle, request in self._open.items():
            request.handle = handle
        self._next_handle = len(self._open) + 1

    def _note(self, event: str) -> None:
        """Adds an event to the spans of all open requests."""
        for request in self._open.values():
            request.note(event)

    def _stream_ended(self) -> None:
        self._streaming = False
        self._note("scheduler lost")
        self._unsent.clear()
        self._resubmit_needed = True
        self.load_of_others = 0
        self.on_lost()
        if self._give_up is None:
            loop = asyncio.get_running_loop()
            self._give_up = loop.call_later(self._reconnect_timeout, self._give_up_waiting)
        self._changed()

    def _stop_waiting(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _give_up_waiting(self) -> None:
        self._give_up = None
        error = Unavailable(
            f"the scheduler was lost and not back within {self._reconnect_timeout:g} s; try again later"
        )
        for request in list(self._open.values()):
            self._end_here(request, ended_with(error))

    def _resubmit(self) -> None:
        """Submits every open request to the scheduler that took over, with what it has generated so far."""
        self._stop_waiting()
        self._resubmit_needed = False
        self._note("resubmitted")
        for handle in self._open:
            self._send(handle)
        logger.info("connected to the scheduler again; resubmitted %d requests", len(self._open))

    def _receive(self, message: scheduler_pb2.ConnectResponse) -> None:
        if message.HasField("deltas"):
            self._spread(message.deltas)
        elif message.HasField("cache"):
            self.load_of_others = message.cache.num_requests - message.cache.num_own_requests
            if self.on_cache is not None:
                self.on_cache(message.cache)
        elif message.HasField("model"):
            self.heard.set()
            if self._engine_ready != message.model.ready:
                self._note("engine attached" if message.model.ready else "engine lost")
            self._engine_ready = message.model.ready
            if message.model.vocab_size:  # 0 from a scheduler that has not seen an engine yet
                self.model = message.model
            if self._resubmit_needed and message.model.ready:
                self._resubmit()
            self._changed()

    def _spread(self, deltas: scheduler_pb2.StepDeltas) -> None:
        """Gives each open request its part of a step. Handles no longer open were aborted meanwhile."""
        get = self._open.get
        told: list[Wakeup] = []
        for admitted in deltas.admitted:
            request = get(admitted.handle)
            if request is not None:
                _note_cached(request, admitted.num_cached_tokens)
        for prompt_logprobs in deltas.prompt_logprobs:
            request = get(prompt_logprobs.handle)
            if request is not None:
                request.add_prompt_logprobs(prompt_logprobs)
                told.append(request.wakeup)
        behind = self._spread_logprobs(deltas) if deltas.logprobs else ()
        for handle, token_id in zip(deltas.handles, deltas.token_ids, strict=True):
            request = get(handle)
            if request is not None:
                request.output_ids.append(token_id)
                wakeup = request.wakeup
                if not wakeup.news:
                    wakeup.news = True
                    told.append(wakeup)
        for state in deltas.pooled_states:
            request = get(state.handle)
            if request is not None:
                request.pooled = state.values
        for ended in deltas.ended:
            request = self._open.pop(ended.handle, None)
            if request is not None:
                _note_cached(request, ended.num_cached_tokens)
                request.end(ended)
                told.append(request.wakeup)
        for request in behind:
            error = Overloaded("the client reads more slowly than log probabilities are generated")
            self._end_here(request, ended_with(error))
        for wakeup in told:
            wakeup.tell()

    def _spread_logprobs(self, deltas: scheduler_pb2.StepDeltas) -> Sequence[OpenRequest]:
        """Returns the requests whose clients are too far behind. They end once they have the message's tokens
        too: a client is told as many tokens as log probabilities.
        """
        behind: dict[int, OpenRequest] = {}
        for index, logprobs in zip(deltas.logprob_indices, deltas.logprobs, strict=True):
            request = self._open.get(deltas.handles[index])
            if request is not None and not request.add_logprobs(logprobs):
                behind[request.handle] = request
        return list(behind.values())

    @property
    def adapters(self) -> Sequence[scheduler_pb2.Adapter]:
        """The adapters that it serves, as far as it has told."""
        return () if self.model is None else self.model.adapters

    def has(self, adapter_id: int) -> bool:
        """Whether it serves an adapter."""
        return any(adapter.adapter_id == adapter_id for adapter in self.adapters)

    async def refresh_model(self) -> None:
        """Asks for the model's facts, in case that they have changed since the scheduler told them.

        Raises:
            Unavailable: the scheduler cannot be reached.
        """
        assert self._stub is not None
        with _status_as_error():
            model: scheduler_pb2.GetModelResponse = await self._stub.GetModel(
                scheduler_pb2.GetModelRequest(), timeout=UNARY_TIMEOUT
            )
        self.model = model
        self._changed()

    async def load_adapter(self, name: str, path: str, *, in_place: bool) -> scheduler_pb2.Adapter:
        """Has an adapter loaded; returns once requests may name it.

        Raises:
            PagewireError: it cannot be.
        """
        assert self._stub is not None
        request = scheduler_pb2.LoadAdapterRequest(name=name, path=path, in_place=in_place)
        with _status_as_error():
            response = await self._stub.LoadAdapter(request, timeout=LOAD_TIMEOUT)
        await self.refresh_model()
        adapter: scheduler_pb2.Adapter = response.adapter
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """Has an adapter unloaded.

        Raises:
            NotFound: there is none of this name.
            PagewireError: it cannot be.
        """
        assert self._stub is not None
        with _status_as_error():
            await self._stub.UnloadAdapter(
                scheduler_pb2.UnloadAdapterRequest(name=name), timeout=UNARY_TIMEOUT
            )
        await self.refresh_model()

    async def get_load(self) -> scheduler_pb2.GetLoadResponse:
        """The scheduler's load.

        Raises:
            Unavailable: the scheduler cannot be reached.
        """
        assert self._stub is not None
        with _status_as_error():
            load: scheduler_pb2.GetLoadResponse = await self._stub.GetLoad(
                scheduler_pb2.GetLoadRequest(), timeout=UNARY_TIMEOUT
            )
            return load

    async def get_timeline(self, request_id: str, client: str) -> Sequence[scheduler_pb2.Timeline]:
        """What happened to a client's request, part by part.

        Args:
            request_id: its public id.
            client: the client's part of `Submission.client`.

        Raises:
            NotFound: the scheduler knows of no such request of this client.
            Unavailable: the scheduler cannot be reached.
        """
        assert self._stub is not None
        with _status_as_error():
            response = await self._stub.GetTimeline(
                scheduler_pb2.GetTimelineRequest(request_id=request_id, client=client), timeout=UNARY_TIMEOUT
            )
            return list(response.parts)

    async def get_metrics(self) -> bytes:
        """The scheduler's metrics in Prometheus text format.

        Raises:
            Unavailable: the scheduler cannot be reached.
        """
        assert self._stub is not None
        with _status_as_error():
            response = await self._stub.GetMetrics(scheduler_pb2.GetMetricsRequest(), timeout=UNARY_TIMEOUT)
            return bytes(response.exposition)

    async def observe(self, interval: float) -> AsyncGenerator[scheduler_pb2.ObserveResponse, None]:
        """What the scheduler does, told every `interval` seconds until the generator is closed.

        Raises:
            Unavailable: the scheduler cannot be reached, or is lost.
            PagewireError: it cannot be observed.
        """
        assert self._stub is not None
        call = self._stub.Observe(scheduler_pb2.ObserveRequest(interval=interval))
        try:
            with _status_as_error():
                async for message in call:
                    yield message
        finally:
            call.cancel()


@contextmanager
def _status_as_error() -> Iterator[None]:
    """Raises what the scheduler answered as this package's error."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unavailable("the scheduler did not answer in time") from error
        raise from_code(error.code().value[0], error.details() or "") from error


def _note_cached(request: OpenRequest, num_cached_tokens: int) -> None:
    """Keeps the first count: after a resubmission the prompt was paid for already."""
    if request.num_cached_tokens is None:
        request.num_cached_tokens = min(num_cached_tokens, len(request.prompt_ids))
        request.admitted_at = time.perf_counter()
