"""A SchedulerService that says what the test tells it to, when it tells it to.

It computes nothing. It stands where the real scheduler would so that tests control tokens, timing and
failures exactly; what the real one does is shown by the end-to-end tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.scheduler.v1 import scheduler_pb2_grpc

EOS = 256
"""The tests' tokenizer has one token a byte, and this one for the end of a turn."""


class ScriptedScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Listens on a Unix socket; keeps what it was sent and sends what `say` is given.

    With `reply` set it answers every submission by itself: the reply's bytes one token a step, then EOS
    (or LENGTH, at max_tokens, or a stop token). Submissions with pooling it answers with what `pool` makes
    of them.
    """

    def __init__(self, path: str, *, ready: bool = True, max_model_len: int = 200) -> None:
        self.target = f"unix:{path}"
        self.ready = ready
        self.max_model_len = max_model_len
        self.takes_changes = True
        self.task = "generate"
        self.labels: list[str] = []
        self.fingerprint = ""
        self.adapters: list[pb.Adapter] = []
        self.num_messages = 0
        self.reply: bytes | None = None
        self.pause_between_tokens = 0.0
        self.pool: Callable[[pb.Submit], Sequence[float]] | None = None
        self.observation = pb.ObserveResponse(ready=True)
        self.num_observers = 0
        self.submits: list[pb.Submit] = []
        self.aborts: list[int] = []
        self.abort_reasons: list[int] = []
        self.num_streams = 0
        self.timelines: dict[tuple[str, str], list[pb.Timeline]] = {}
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._context: grpc.aio.ServicerContext | None = None
        self._server: grpc.aio.Server | None = None
        self._replies: set[asyncio.Task[None]] = set()

    async def start(self) -> ScriptedScheduler:
        self._server = grpc.aio.server()
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Ends at once, as if killed."""
        for reply in self._replies:
            reply.cancel()
        if self._server is not None:
            await self._server.stop(None)
        self._context = None

    def model(self) -> pb.GetModelResponse:
        """The facts; none but `ready` before there is an engine, like the real one."""
        if not self.ready:
            return pb.GetModelResponse(ready=False)
        return pb.GetModelResponse(
            model="scripted",
            vocab_size=257,
            max_model_len=self.max_model_len,
            eos_token_ids=[EOS],
            block_size=16,
            num_blocks=100,
            max_num_seqs=8,
            hidden_size=4,
            ready=True,
            takes_changes=self.takes_changes,
            task=self.task,
            labels=self.labels,
            fingerprint=self.fingerprint,
            adapters=self.adapters,
            max_loras=4 if self.adapters else 0,
        )

    async def Connect(  # noqa: N802
        self, requests: AsyncIterator[pb.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await context.write(pb.ConnectResponse(model=self.model()))
        async with self._changed:
            self.num_streams += 1
            self._context = context
            self._changed.notify_all()
        async for message in requests:
            async with self._changed:
                self.num_messages += 1
                changes = message.changes if message.HasField("changes") else pb.Changes()
                if message.HasField("submit"):
                    changes.submits.append(message.submit)
                elif message.HasField("abort"):
                    changes.aborts.append(message.abort)
                self.aborts += [abort.handle for abort in changes.aborts]
                self.abort_reasons += [abort.reason for abort in changes.aborts]
                for submit in changes.submits:
                    self.submits.append(submit)
                    self._answer(submit, context)
                self._changed.notify_all()

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(
            num_requests_running=3, num_used_blocks=25, num_blocks=100, max_num_seqs=8, max_num_waiting=9
        )

    async def GetMetrics(  # noqa: N802
        self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricsResponse:
        return pb.GetMetricsResponse(exposition=b"pagewire:num_requests_running 3.0\n")

    async def GetTimeline(  # noqa: N802
        self, request: pb.GetTimelineRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTimelineResponse:
        parts = self.timelines.get((request.client, request.request_id))
        if parts is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown")
        return pb.GetTimelineResponse(parts=parts)

    async def Observe(  # noqa: N802
        self, request: pb.ObserveRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ObserveResponse]:
        self.num_observers += 1
        try:
            while True:
                yield self.observation
                await asyncio.sleep(0.1)
        finally:
            self.num_observers -= 1

    async def until(self, condition: Callable[[ScriptedScheduler], bool]) -> None:
        """Waits for what the frontend sends to fulfil a condition."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: condition(self)), 5)

    async def submitted(self, count: int = 1) -> pb.Submit:
        """The count-th submission ever."""
        await self.until(lambda scheduler: len(scheduler.submits) >= count)
        return self.submits[count - 1]

    async def aborted(self, handle: int) -> None:
        await self.until(lambda scheduler: handle in scheduler.aborts)

    async def attach_engine(self) -> None:
        """Becomes ready and says so."""
        await self._say_ready(True)

    async def lose_engine(self) -> None:
        """The opposite."""
        await self._say_ready(False)

    async def _say_ready(self, ready: bool) -> None:
        self.ready = ready
        assert self._context is not None
        await self._context.write(pb.ConnectResponse(model=self.model()))

    async def send(self, deltas: pb.StepDeltas, to: grpc.aio.ServicerContext | None = None) -> None:
        """Writes to one frontend's stream, by default the one that connected last."""
        context = to or self._context
        assert context is not None
        async with self._writing:  # a call takes one write at a time
            await context.write(pb.ConnectResponse(deltas=deltas))

    async def tell(self, cache: pb.CacheChanges) -> None:
        """Tells the frontend that connected last which blocks are cached."""
        assert self._context is not None
        async with self._writing:
            await self._context.write(pb.ConnectResponse(cache=cache))

    async def say(
        self,
        handle: int,
        tokens: Sequence[int],
        *,
        end: pb.Ended | None = None,
        logprobs: Sequence[pb.TokenLogprobs] = (),
        cached: int | None = None,
        to: grpc.aio.ServicerContext | None = None,
    ) -> None:
        """One step in which a request gains tokens and perhaps ends."""
        deltas = pb.StepDeltas(handles=[handle] * len(tokens), token_ids=tokens)
        if logprobs:
            deltas.logprob_indices.extend(range(len(tokens)))
            deltas.logprobs.extend(logprobs)
        if cached is not None:
            deltas.admitted.append(pb.Admitted(handle=handle, num_cached_tokens=cached))
        if end is not None:
            end.handle = handle
            deltas.ended.append(end)
        await self.send(deltas, to)

    def _answer(self, submit: pb.Submit, to: grpc.aio.ServicerContext) -> None:
        if submit.pooling:
            reply = self._pooled(submit, to) if self.pool is not None else None
        else:
            reply = self._reply(submit, self.reply, to) if self.reply is not None else None
        if reply is not None:
            task = asyncio.create_task(reply)
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)

    async def _pooled(self, submit: pb.Submit, to: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(self.pause_between_tokens)
        assert self.pool is not None
        state = pb.PooledState(handle=submit.handle, values=self.pool(submit))
        end = pb.Ended(handle=submit.handle, reason=pb.END_REASON_STOP)
        await self.send(pb.StepDeltas(pooled_states=[state], ended=[end]), to)

    async def _reply(self, submit: pb.Submit, reply: bytes, to: grpc.aio.ServicerContext) -> None:
        emitted = len(submit.token_ids) - submit.num_prompt_tokens
        limit = submit.sampling.max_tokens
        for position, token in enumerate([*reply, EOS][:limit]):
            if position < emitted:
                continue
            await asyncio.sleep(self.pause_between_tokens)
            end = None
            if token == EOS or token in submit.sampling.stop_token_ids:
                end = stop(token)
            elif position + 1 == limit:
                end = pb.Ended(reason=pb.END_REASON_LENGTH)
            if submit.handle in self.aborts or to.done():
                return
            cached = 0 if position == emitted else None
            await self.say(submit.handle, [token], end=end, cached=cached, to=to)
            if end is not None:
                return


def stop(token_id: int) -> pb.Ended:
    return pb.Ended(reason=pb.END_REASON_STOP, stop_token_id=token_id)


def failure(code: int, message: str, param: str = "") -> pb.Ended:
    return pb.Ended(reason=pb.END_REASON_ERROR, status=code, error=message, param=param)
