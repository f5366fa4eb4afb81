"""What answers under /v2."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any

from aiohttp import web

from frontend.generation.answer import Answer
from frontend.generation.events import Event
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.answer_stream import StreamSink
from frontend.http.body import parse
from frontend.http.event_stream import EventStream
from frontend.http.failure import Failure
from frontend.http.request_id import REQUEST_ID
from frontend.http.triton.bodies import GenerateBody, GenerateFields, IndexBody
from frontend.http.triton.errors import TRITON_ERRORS
from frontend.http.triton.infer_body import infer_answer, read_infer
from frontend.triton.inputs import INPUTS
from frontend.triton.model import VERSION, TritonModel
from frontend.triton.request import Inference, InferRequest, id_for_logs, read_inference, tensor_of
from frontend.triton.responses import Response, Responses
from pagewire.base.errors import InvalidRequest, PagewireError


class TritonHandlers:
    """The endpoints. Unknown models are a 404, whatever else is asked."""

    def __init__(self, pipeline: GenerationPipeline, model: TritonModel, stall_timeout: float) -> None:
        """`stall_timeout`: see EventStream."""
        self._pipeline = pipeline
        self._model = model
        self._stall_timeout = stall_timeout

    async def live(self, request: web.Request) -> web.Response:
        """GET /v2/health/live"""
        return web.Response(text="")

    async def ready(self, request: web.Request) -> web.Response:
        """GET /v2/health/ready"""
        if not self._pipeline.ready:
            raise InvalidRequest(self._pipeline.why_not_ready())  # Triton's status for it is 400
        return web.Response(text="")

    async def model_ready(self, request: web.Request) -> web.Response:
        """GET /v2/models/{model}/ready"""
        self._model.check(*_named(request))
        return await self.ready(request)

    async def server_metadata(self, request: web.Request) -> web.Response:
        """GET /v2"""
        return web.json_response(self._model.server_metadata())

    async def metadata(self, request: web.Request) -> web.Response:
        """GET /v2/models/{model}"""
        return web.json_response(self._model.metadata(*_named(request)))

    async def config(self, request: web.Request) -> web.Response:
        """GET /v2/models/{model}/config"""
        return web.json_response(self._model.config(*_named(request)))

    async def statistics(self, request: web.Request) -> web.Response:
        """GET /v2/models/{model}/stats, and /v2/models/stats for all."""
        return web.json_response(self._model.statistics(*_named(request)))

    async def index(self, request: web.Request) -> web.Response:
        """POST /v2/repository/index"""
        data = await request.read()
        ready_only = parse(IndexBody, data).ready if data.strip() else False
        return web.json_response(self._model.index(ready_only=ready_only))

    async def generate(self, request: web.Request) -> web.Response:
        """POST /v2/models/{model}/generate"""
        inference = await self._read_generate(request, streams=False)
        responses = Responses(inference)
        async with self._pipeline.start(inference.request) as answer:
            whole = responses.whole(await answer.whole())
        flat = Flattener(inference.asked, responses.parameters)
        return web.Response(body=flat.object(whole), content_type="application/json")

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """POST /v2/models/{model}/generate_stream"""
        inference = await self._read_generate(request, streams=True)
        stream = EventStream(
            request, request_id=inference.request.request_id, stall_timeout=self._stall_timeout
        )
        async with self._pipeline.start(inference.request) as answer:
            return await stream.send(_frames(stream, inference, answer), failed=_failed)

    async def infer(self, request: web.Request) -> web.Response:
        """POST /v2/models/{model}/infer"""
        name, version = _named(request)
        self._model.check(name, version)
        asked, as_json = read_infer(name, request.headers, await request.read())
        inference = _understood(request, asked, streams=False)
        responses = Responses(inference)
        async with self._pipeline.start(inference.request) as answer:
            whole = responses.whole(await answer.whole())
        return infer_answer(asked, whole, responses.parameters, as_json)

    async def _read_generate(self, request: web.Request, *, streams: bool) -> Inference:
        name, version = _named(request)
        self._model.check(name, version)
        body = parse(GenerateBody, await request.read())
        return _understood(request, _asked(name, body), streams=streams)


def _named(request: web.Request) -> tuple[str, str]:
    """The model and the version that a path names."""
    return request.match_info.get("model", ""), request.match_info.get("version", "")


def _asked(model: str, body: GenerateFields) -> InferRequest:
    values = {name: getattr(body, name) for name in INPUTS}
    return InferRequest(
        model=model,
        id=body.id or "",
        tensors=[tensor_of(name, value) for name, value in values.items() if value is not None],
        parameters=body.parameters or {},
    )


def _understood(request: web.Request, asked: InferRequest, *, streams: bool) -> Inference:
    if asked.id:
        request[REQUEST_ID] = id_for_logs(asked.id)
    return read_inference(asked, request_id=request[REQUEST_ID], streams=streams)


async def _frames(stream: EventStream, inference: Inference, answer: Answer) -> AsyncGenerator[bytes, None]:
    responses = Responses(inference)
    flat = Flattener(inference.asked, responses.parameters)

    def frames(made: Sequence[Response]) -> bytes:
        return b"".join(_frame(flat.object(each)) for each in made if each.outputs)

    if not inference.stream:
        yield frames(responses.each(await answer.whole()))
        return

    def render(events: Sequence[Event], answer: Answer) -> bytes:
        return frames(responses.deltas(events))

    async with aclosing(answer.rounds(StreamSink(stream, answer, render))) as rounds:
        async for events in rounds:
            yield render(events, answer)


class Flattener:
    """Writes responses as generate has them: objects with the outputs by name, one-element ones as values."""

    def __init__(self, asked: InferRequest, parameters: Mapping[str, Any]) -> None:
        head: dict[str, Any] = {"id": asked.id} if asked.id else {}
        head |= {"model_name": asked.model, "model_version": VERSION, **parameters}
        self._head = json.dumps(head, ensure_ascii=False)[:-1]

    def object(self, response: Response) -> bytes:
        """A response, in JSON."""
        parts = [self._head]
        for tensor in response.outputs:
            values = tensor.values
            shown = values[0] if len(values) == 1 else list(values)
            text = (
                encode_basestring(shown) if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
            )
            parts.append(f', "{tensor.name}": {text}')
        return ("".join(parts) + "}").encode()


def _frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _failed(error: PagewireError) -> bytes:
    return _frame(json.dumps(TRITON_ERRORS.body(Failure.of(error)), ensure_ascii=False).encode())
