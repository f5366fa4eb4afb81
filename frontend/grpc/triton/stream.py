"""ModelStreamInfer: many requests side by side on one stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc

from frontend.access_log import AccessLog
from frontend.generation.pipeline import GenerationPipeline
from frontend.grpc.interceptor import Undecodable
from frontend.grpc.stall import StallWatch
from frontend.grpc.triton.messages import FINAL_PARAMETER, StreamMessages, read_message
from frontend.triton.model import TritonModel
from frontend.triton.request import Inference, id_for_logs, read_inference
from frontend.triton.responses import Responses
from pagewire.base.errors import PagewireError
from pagewire.telemetry.context import CURRENT_REQUEST
from pagewire.triton import triton_pb2 as pb

logger = logging.getLogger(__name__)

MAX_OPEN = 1024
"""Requests of one stream that are answered side by side; further ones are read when one of them ends."""

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


class InferStream:
    """Answers one stream's requests, each in a task. All tasks end with `answer`, however that ends."""

    def __init__(
        self,
        pipeline: GenerationPipeline,
        model: TritonModel,
        access_log: AccessLog,
        context: grpc.aio.ServicerContext,
        watch: StallWatch,
    ) -> None:
        """`watch`: gives up the stream if its client takes nothing."""
        self._pipeline = pipeline
        self._model = model
        self._access_log = access_log
        self._context = context
        self._peer = context.peer()  # which the library forgets when the client leaves
        self._watch = watch
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._writing = asyncio.Lock()  # a call takes one write at a time

    async def answer(self, requests: AsyncIterator[pb.ModelInferRequest | Undecodable]) -> None:
        """Answers what comes until the client has no more to ask and everything is answered."""
        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                await self._room.acquire()
                task = tasks.create_task(self._answer_one(request))
                task.add_done_callback(lambda _: self._room.release())

    async def _answer_one(self, message: pb.ModelInferRequest | Undecodable) -> None:
        """Answers a request. What goes wrong with it is told in its place; the stream goes on."""
        began = time.perf_counter()
        public_id = "" if isinstance(message, Undecodable) else message.id
        request_id, outcome = id_for_logs(public_id), "client closed"
        call = CURRENT_REQUEST.get()
        if call is not None:
            CURRENT_REQUEST.set(replace(call, request_id=request_id, received=time.time()))
        try:
            try:
                if isinstance(message, Undecodable):
                    raise message.error()
                await self._infer(self._read(message, request_id))
                outcome = "OK"
            except PagewireError as error:
                outcome = error.code.name
                await self._fail(public_id, error.message)
            except Exception:
                logger.exception("request %s failed unexpectedly", request_id)
                outcome = "INTERNAL"
                await self._fail(public_id, "internal error; the server's log has the details")
        finally:
            self._access_log.ended(request_id, self._peer, _METHOD, outcome, began)

    def _read(self, message: pb.ModelInferRequest, request_id: str) -> Inference:
        self._model.check(message.model_name, message.model_version)
        return read_inference(
            read_message(message),
            request_id=request_id,
            streams=True,
            remaining=self._context.time_remaining(),
        )

    async def _infer(self, inference: Inference) -> None:
        responses = Responses(inference)
        messages = StreamMessages(inference.asked, responses.parameters)
        async with self._pipeline.start(inference.request) as answer:
            if not inference.stream:
                for response in responses.each(await answer.whole()):
                    await self._write(messages.of(response))
                return
            async with aclosing(answer.rounds()) as rounds:
                async for events in rounds:
                    for response in responses.deltas(events):
                        await self._write(messages.of(response))

    async def _fail(self, public_id: str, text: str) -> None:
        response = pb.ModelStreamInferResponse(error_message=text)
        response.infer_response.id = public_id
        response.infer_response.parameters[FINAL_PARAMETER].bool_param = True
        await self._write(response)

    async def _write(self, response: pb.ModelStreamInferResponse) -> None:
        async with self._writing:
            await self._watch.write(self._context, response)
