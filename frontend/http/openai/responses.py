"""/v1/responses: OpenAI's newer way to converse, as far as it works without storing anything."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from aiohttp import web

from frontend.caller import client_of
from frontend.chat.conversation import Conversation
from frontend.generation.answer import Answer
from frontend.generation.events import Delta, Finished
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import GenerationRequest, TextPrompt, check_request_id, resolve_sampling
from frontend.http.body import parse
from frontend.http.errors import error_response
from frontend.http.event_stream import EventStream
from frontend.http.failure import Failure
from frontend.http.openai.response_shape import ResponseBuilder, event_frame
from frontend.http.openai.schemas.responses import ResponsesBody
from frontend.http.openai.schemas.structured import named_after
from frontend.http.relaxed import note_relaxed
from frontend.http.request_id import REQUEST_ID
from pagewire.base.errors import InvalidRequest


class ResponseHandlers:
    """The endpoints around responses."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        """`stall_timeout`: see EventStream."""
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        """POST /v1/responses. aiohttp cancels this when the client disconnects, which aborts the request."""
        body = parse(ResponsesBody, await http_request.read())
        body.check()
        model = self._pipeline.model
        if body.request_id:
            http_request[REQUEST_ID] = check_request_id(body.request_id)
        conversation = body.to_converse()
        if body.truncation == "auto":
            conversation = await self._fitting(conversation, body.max_output_tokens or 1)
        request = GenerationRequest(
            request_id=http_request[REQUEST_ID],
            model=body.model or "",
            prompts=[conversation],
            sampling=resolve_sampling(model.defaults, body.sampling_given()),
            priority=body.priority or 0,
            client=client_of(body.user),
            timeout=body.timeout,
            cache_salt=body.cache_salt or "",
            strict_schema=body.strict_schema(),
        )
        builder = ResponseBuilder(
            body,
            request.sampling,
            request_id=request.request_id,
            model=request.model or model.names[0],
            tokenizer=model.tokenizer,
        )
        try:
            return await self._answer(http_request, request, builder, stream=bool(body.stream))
        except InvalidRequest as error:
            raise named_after("text.format.schema" if body.structured_output() else None, error) from None

    async def _answer(
        self, http_request: web.Request, request: GenerationRequest, builder: ResponseBuilder, *, stream: bool
    ) -> web.StreamResponse:
        async with self._pipeline.start(request) as answer:
            note_relaxed(http_request, answer.relaxed)
            frames = self._frames(answer, builder)
            if stream:
                events = EventStream(
                    http_request, request_id=request.request_id, stall_timeout=self._stall_timeout
                )
                return await events.send(
                    frames, failed=lambda error: b"".join(map(event_frame, builder.fail(error)))
                )
            async for _ in frames:
                pass  # the builder keeps everything
            return web.json_response(builder.response)

    async def stored(self, http_request: web.Request) -> web.Response:
        """GET and DELETE /v1/responses/{id}, and what lies below: nothing is ever there."""
        message = (
            f"there is no response {http_request.match_info['id']!r}: this server stores no responses; each "
            "is told once, in the answer to the request that made it"
        )
        return error_response(http_request.path, Failure(status=404, message=message, code="not_found"))

    async def _frames(self, answer: Answer, builder: ResponseBuilder) -> AsyncGenerator[bytes, None]:
        """What a stream shows, one round of events at a time."""
        begun = False
        async with aclosing(answer.rounds()) as rounds:
            async for events in rounds:
                shown = [] if begun else builder.begin()
                begun = True
                for event in events:
                    if isinstance(event, Delta):
                        shown += builder.add(event)
                    elif isinstance(event, Finished):
                        shown += builder.end(event, await self._num_tokens(builder.reasoning))
                yield b"".join(map(event_frame, shown))

    async def _num_tokens(self, text: str) -> int:
        """How many tokens a text of the model's own has (nearly: it may have written it in other tokens)."""
        if not text:
            return 0
        return len(await self._pipeline.tokenize(TextPrompt(text=text, add_special_tokens=False)))

    async def _fitting(self, conversation: Conversation, num_output_tokens: int) -> Conversation:
        """The conversation without the fewest of its oldest turns, so that it fits the model's context.

        Turns of the system stay, and the others begin with one of the user's: an answer without its question
        or a tool's without its call would be no conversation. If even the last is too long, it is kept for
        the pipeline to refuse.
        """
        facts = self._pipeline.link.model
        if facts is None:
            return conversation
        room = facts.max_model_len - num_output_tokens
        messages = conversation.messages
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]

        def beginning_at(start: int) -> Conversation:
            kept = [message for message in messages[:start] if message["role"] in ("system", "developer")]
            return replace(conversation, messages=[*kept, *messages[start:]])

        if not starts or await self._fits(conversation, room):
            return conversation
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            if await self._fits(beginning_at(starts[middle]), room):
                high = middle
            else:
                low = middle + 1
        return beginning_at(starts[low])

    async def _fits(self, conversation: Conversation, room: int) -> bool:
        return len(await self._pipeline.tokenize(conversation)) <= room
