"""/api/chat and /api/generate."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from frontend.caller import client_of
from frontend.generation.message_parser import NewParser
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import (
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
    resolve_sampling,
)
from frontend.http.answer_stream import send_answer
from frontend.http.body import parse
from frontend.http.event_stream import EventStream
from frontend.http.failure import Failure
from frontend.http.ollama.context import joined, next_turn
from frontend.http.ollama.errors import OLLAMA_ERRORS
from frontend.http.ollama.lines import AnswerLines, ChatLines, GenerateLines, Times
from frontend.http.ollama.names import served_name
from frontend.http.ollama.replies import json_line, json_response
from frontend.http.ollama.schemas.generation import (
    OllamaChatBody,
    OllamaGenerateBody,
    OllamaGeneratingBody,
)
from frontend.http.ollama.schemas.keep_alive import asks_to_unload
from frontend.http.ollama.schemas.options import DEFAULTS
from frontend.http.relaxed import note_relaxed
from frontend.http.request_id import REQUEST_ID
from frontend.text.rendered_prompt import RenderedPrompt
from pagewire.base.errors import PagewireError
from pagewire.wire.sampling_params import SamplingParams


class OllamaGenerateHandlers:
    """The two generating endpoints."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        """`stall_timeout`: see EventStream."""
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout

    async def chat(self, http_request: web.Request) -> web.StreamResponse:
        """POST /api/chat. Without messages it only says that the model is there."""
        times = Times()
        body = parse(OllamaChatBody, await http_request.read())
        lines = ChatLines(**self._told(body, times))
        if not body.messages:
            return await self._load(body, lines)
        request = self._request(http_request, body, body.conversation(self._pipeline.model))
        return await self._generate(http_request, request, lines, times, streams=body.streams)

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        """POST /api/generate. Without a prompt it only says that the model is there."""
        times = Times()
        body = parse(OllamaGenerateBody, await http_request.read())
        body.check()
        lines = GenerateLines(with_context=not body.raw, **self._told(body, times))
        if not body.prompt:
            return await self._load(body, lines)
        request = await self._to_generate(http_request, body)
        return await self._generate(http_request, request, lines, times, streams=body.streams)

    def _told(self, body: OllamaGeneratingBody, times: Times) -> dict[str, Any]:
        model = self._pipeline.model
        served_name(model, body.model)
        return {"model": body.model or model.names[0], "times": times, "tokenizer": model.tokenizer}

    async def _load(self, body: OllamaGeneratingBody, lines: AnswerLines) -> web.Response:
        """Waits for an engine, if there is none. Nothing is ever unloaded, but who asks for it is told what
        Ollama tells."""
        if body.keep_alive is not None and asks_to_unload(body.keep_alive):
            return json_response(lines.empty("unload"))
        async with self._pipeline.admit(served_name(self._pipeline.model, body.model), None) as admitted:
            admitted.outcome = "loaded"
            return json_response(lines.empty("load"))

    async def _to_generate(self, http_request: web.Request, body: OllamaGenerateBody) -> GenerationRequest:
        """The request that a body of /api/generate is."""
        model = self._pipeline.model
        conversation = body.conversation(model)
        if body.raw or model.template is None:
            text = f"{body.system}\n\n{body.prompt}" if body.system else body.prompt or ""
            if not body.context:
                return self._request(http_request, body, TextPrompt(text=text))
            token_ids = await self._pipeline.in_thread(joined, model, body.context, RenderedPrompt(text))
            return self._request(http_request, body, TokenPrompt(token_ids=token_ids))
        if not body.context:
            return self._request(http_request, body, conversation)
        behind = await self._pipeline.in_thread(next_turn, model, conversation)
        token_ids = await self._pipeline.in_thread(joined, model, body.context, behind)
        reading = model.replies.read(conversation, behind.text, self._sampling(body))
        prompt = TokenPrompt(token_ids=token_ids)
        return self._request(
            http_request, body, prompt, sampling=reading.sampling, new_parser=reading.new_parser
        )

    def _sampling(self, body: OllamaGeneratingBody) -> SamplingParams:
        defaults = {**DEFAULTS, **self._pipeline.model.defaults}
        return resolve_sampling(defaults, body.sampling_given())

    def _request(
        self,
        http_request: web.Request,
        body: OllamaGeneratingBody,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        new_parser: NewParser | None = None,
    ) -> GenerationRequest:
        if body.keep_alive is not None:
            asks_to_unload(body.keep_alive)  # which refuses what is no duration
        return GenerationRequest(
            request_id=http_request[REQUEST_ID],
            model=served_name(self._pipeline.model, body.model),
            prompts=[prompt],
            sampling=sampling or self._sampling(body),
            client=client_of(None),
            return_prompt_ids=isinstance(body, OllamaGenerateBody) and not body.raw,
            strict_schema=False,
            new_parser=new_parser,
        )

    async def _generate(
        self,
        http_request: web.Request,
        request: GenerationRequest,
        lines: AnswerLines,
        times: Times,
        *,
        streams: bool,
    ) -> web.StreamResponse:
        """aiohttp cancels this when the client disconnects; leaving the pipeline's context aborts the
        request."""
        async with self._pipeline.start(request) as answer:
            note_relaxed(http_request, answer.relaxed)
            times.submit()
            if not streams:
                whole = await answer.whole()
                return json_response(lines.whole(whole, answer.first_token_at))
            stream = EventStream(
                http_request,
                request_id=request.request_id,
                stall_timeout=self._stall_timeout,
                media_type="application/x-ndjson",
            )

            def failed(error: PagewireError) -> bytes:
                return json_line(OLLAMA_ERRORS.body(Failure.of(error)))

            return await send_answer(stream, answer, lines.lines, failed=failed, begins_with_text=True)
