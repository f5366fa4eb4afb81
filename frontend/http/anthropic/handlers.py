"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from aiohttp import web

from frontend.caller import client_of
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import GenerationRequest, resolve_sampling
from frontend.http.answer_stream import send_answer
from frontend.http.anthropic.bodies import CountTokensBody, MessagesBody
from frontend.http.anthropic.errors import ANTHROPIC_ERRORS
from frontend.http.anthropic.message_shape import MessageShape, event_frame
from frontend.http.body import parse
from frontend.http.event_stream import EventStream
from frontend.http.failure import Failure
from frontend.http.relaxed import note_relaxed
from frontend.http.request_id import REQUEST_ID
from pagewire.base.errors import InvalidRequest, PagewireError

_PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class MessageHandlers:
    """The endpoints of messages."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        """`stall_timeout`: see EventStream."""
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        """POST /v1/messages. aiohttp cancels this when the client disconnects, which aborts the request."""
        body = parse(MessagesBody, await http_request.read())
        model = self._pipeline.model
        request = GenerationRequest(
            request_id=http_request[REQUEST_ID],
            model=body.model or "",
            prompts=[body.to_converse()],
            sampling=resolve_sampling(model.defaults, body.sampling_given()),
            client=client_of(body.metadata.user_id if body.metadata else None),
        )
        shape = MessageShape(
            message_id=f"msg_{request.request_id}",
            model=request.model or model.names[0],
            max_tokens=body.max_tokens,
        )
        try:
            return await self._answer(http_request, request, shape, stream=bool(body.stream))
        except InvalidRequest as error:
            raise _in_their_words(error) from None

    async def count_tokens(self, http_request: web.Request) -> web.Response:
        """POST /v1/messages/count_tokens"""
        body = parse(CountTokensBody, await http_request.read())
        self._pipeline.model.check_name(body.model or "")
        token_ids = await self._pipeline.tokenize(body.to_converse())
        return web.json_response({"input_tokens": len(token_ids)})

    async def _answer(
        self, http_request: web.Request, request: GenerationRequest, shape: MessageShape, *, stream: bool
    ) -> web.StreamResponse:
        def failed(error: PagewireError) -> bytes:
            return event_frame(ANTHROPIC_ERRORS.body(Failure.of(error).of_request(request.request_id)))

        async with self._pipeline.start(request) as answer:
            note_relaxed(http_request, answer.relaxed)
            if not stream:
                return web.json_response(await shape.whole(answer))
            events = EventStream(
                http_request,
                request_id=request.request_id,
                stall_timeout=self._stall_timeout,
                ping=_PING,
            )
            return await send_answer(events, answer, shape.frames, failed=failed)


def _in_their_words(error: InvalidRequest) -> InvalidRequest:
    """The refusal of a prompt begins as Anthropic's does: clients look for these words to shorten the
    conversation by themselves. (A rendered conversation has nothing else that could be wrong with it.)"""
    if error.param != "prompt":
        return error
    return InvalidRequest(f"prompt is too long: {error.message}", param="messages")
