"""/v1/chat/completions and /v1/completions: one handler, two shapes."""

from __future__ import annotations

import logging
import time
from contextlib import aclosing

from aiohttp import web

from frontend.completion import Completion, Delta, Finished, PositionLogprobs
from frontend.generation import GenerationPipeline
from frontend.generation_request import GenerationRequest, check_request_id, resolve_sampling
from frontend.http.errors import error_body
from frontend.http.request_id import REQUEST_ID
from frontend.http.schemas.base import parse
from frontend.http.schemas.chat import ChatCompletionBody
from frontend.http.schemas.completion import CompletionBody
from frontend.http.schemas.generation import GenerationBody
from frontend.http.shapes import DONE, ChatShape, ResponseShape, TextShape, event_frame
from pagewire.errors import PagewireError

logger = logging.getLogger(__name__)


class GenerateHandlers:
    """The two generating endpoints."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

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
            prompt=body.prompt_to_continue(),
            sampling=resolve_sampling(model.defaults, body.sampling_given()),
            priority=body.priority or 0,
            timeout=body.timeout,
        )
        shape = shape_of(
            response_id=id_prefix + request.request_id,
            model=request.model or model.names[0],
            created=int(time.time()),
            with_usage=body.wants_usage,
            tokenizer=model.tokenizer,
        )
        async with self._pipeline.start(request) as completion:
            if not body.stream:
                return web.json_response(shape.whole(await completion.whole()))
            return await _stream(http_request, completion, shape, with_usage=body.wants_usage)


async def _stream(
    http_request: web.Request, completion: Completion, shape: ResponseShape, *, with_usage: bool
) -> web.StreamResponse:
    """Writes server-sent events. Headers go out with the first event, so that a request the scheduler
    refuses gets its proper status."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )
    try:
        async with aclosing(completion.events()) as events:
            held: list[PositionLogprobs] = []
            async for event in events:
                frames = b"" if response.prepared else shape.opening_frame()
                if isinstance(event, Delta):
                    held += event.logprobs
                    if event.text:
                        frames += shape.text_frame(event.text, held)
                        held = []
                else:
                    frames += _end(shape, event, held, with_usage=with_usage)
                if not response.prepared:
                    await response.prepare(http_request)
                if frames:
                    await response.write(frames)
    except PagewireError as error:
        if not response.prepared:
            raise
        await _fail(http_request, response, error)
    except ConnectionError:
        logger.debug("request %s: the client is gone", completion.request_id)
    except Exception:
        if not response.prepared:
            raise
        logger.exception("request %s failed while it was streamed", completion.request_id)
        await _fail(http_request, response, PagewireError("internal error; the server's log has the details"))
    else:
        await response.write_eof()
    return response


def _end(
    shape: ResponseShape, finished: Finished, held: list[PositionLogprobs], *, with_usage: bool
) -> bytes:
    frames = shape.text_frame("", held) if held else b""
    frames += shape.closing_frame(finished.reason.value)
    if with_usage:
        frames += shape.usage_frame(finished.usage)
    return frames + DONE


async def _fail(http_request: web.Request, response: web.StreamResponse, error: PagewireError) -> None:
    """The status went out long ago: an error frame, then the connection is closed."""
    response.force_close()
    await response.write(event_frame(error_body(error)))
    await response.write_eof()
    if http_request.transport is not None:
        http_request.transport.close()
