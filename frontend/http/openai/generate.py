"""/v1/chat/completions and /v1/completions: one handler, two shapes."""

from __future__ import annotations

import time

from aiohttp import web

from frontend.caller import client_of
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import GenerationRequest, check_request_id, resolve_sampling
from frontend.http.answer_stream import send_answer
from frontend.http.body import parse
from frontend.http.event_stream import EventStream
from frontend.http.failure import Failure
from frontend.http.openai.chat_shape import ChatShape
from frontend.http.openai.errors import OPENAI_ERRORS
from frontend.http.openai.schemas.chat import ChatCompletionBody
from frontend.http.openai.schemas.completion import CompletionBody
from frontend.http.openai.schemas.generation import GenerationBody
from frontend.http.openai.schemas.structured import named_after
from frontend.http.openai.shapes import ResponseShape, event_frame
from frontend.http.openai.text_shape import TextShape
from frontend.http.relaxed import note_relaxed
from frontend.http.request_id import REQUEST_ID
from pagewire.base.errors import InvalidRequest, PagewireError


class GenerateHandlers:
    """The two generating endpoints."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        """`stall_timeout`: see EventStream."""
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout

    async def chat_completions(self, http_request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = parse(ChatCompletionBody, await http_request.read())
        return await self._generate(http_request, body, ChatShape, "chatcmpl-")

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = parse(CompletionBody, await http_request.read())
        return await self._generate(http_request, body, TextShape, "cmpl-")

    async def _generate(
        self,
        http_request: web.Request,
        body: GenerationBody,
        shape_of: type[ResponseShape],
        id_prefix: str,
    ) -> web.StreamResponse:
        """aiohttp cancels this when the client disconnects; leaving the pipeline's context aborts the
        request."""
        model = self._pipeline.model
        if body.request_id:
            http_request[REQUEST_ID] = check_request_id(body.request_id)
        request = GenerationRequest(
            request_id=http_request[REQUEST_ID],
            model=body.model or "",
            prompts=body.prompts_to_continue(),
            sampling=resolve_sampling(model.defaults, body.sampling_given()),
            priority=body.priority or 0,
            client=client_of(body.user),
            timeout=body.timeout,
            cache_salt=body.cache_salt or "",
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            echo=body.wants_echo,
            return_prompt_ids=bool(body.return_token_ids),
            strict_schema=body.strict_schema(),
            new_parser=body.new_parser(model),
        )
        shape = shape_of(
            response_id=id_prefix + request.request_id,
            model=request.model or model.names[0],
            created=int(time.time()),
            options=body.options(num_prompts=len(request.prompts)),
            skip_special_tokens=request.sampling.skip_special_tokens,
            tokenizer=model.tokenizer,
        )
        try:
            async with self._pipeline.start(request) as answer:
                note_relaxed(http_request, answer.relaxed)
                if not body.stream:
                    return web.json_response(shape.whole(await answer.whole()))
                stream = EventStream(
                    http_request, request_id=request.request_id, stall_timeout=self._stall_timeout
                )
                return await send_answer(stream, answer, shape.frames, failed=_failed)
        except InvalidRequest as error:
            raise named_after(body.constraint_field(), error) from None


def _failed(error: PagewireError) -> bytes:
    return event_frame(OPENAI_ERRORS.body(Failure.of(error)))
