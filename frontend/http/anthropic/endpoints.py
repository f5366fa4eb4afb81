"""Anthropic's endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.anthropic import answers
from frontend.http.anthropic.bodies import CountTokensBody, MessagesBody
from frontend.http.anthropic.errors import OVERLOADED
from frontend.http.anthropic.handlers import MessageHandlers
from frontend.http.endpoint import ERRORS_OF_BODIES, Api, Endpoint, Handler
from frontend.metrics import FrontendMetrics

_HELLO = [{"role": "user", "content": "Name the capital of France."}]
_ERRORS = tuple(OVERLOADED if status == 503 else status for status in ERRORS_OF_BODIES)

_ENDPOINTS = (
    Endpoint(
        name="createMessage",
        method="POST",
        path="/v1/messages",
        tag="Generation",
        summary="Continue a conversation, by Anthropic's API",
        description="Headers `anthropic-version` and `anthropic-beta` are taken and change nothing.",
        body=MessagesBody,
        example={"messages": _HELLO, "max_tokens": 64},
        answer=answers.MessageAnswer,
        event=answers.MessageEvent,
        error=answers.MessageErrorAnswer,
        errors=_ERRORS,
    ),
    Endpoint(
        name="countMessageTokens",
        method="POST",
        path="/v1/messages/count_tokens",
        tag="Generation",
        summary="Count the tokens that a conversation's prompt has",
        body=CountTokensBody,
        example={"messages": _HELLO},
        answer=answers.TokenCount,
        error=answers.MessageErrorAnswer,
        errors=_ERRORS,
    ),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    messages = MessageHandlers(pipeline, config.stall_timeout)
    return {"createMessage": messages.create, "countMessageTokens": messages.count_tokens}


ANTHROPIC = Api(_ENDPOINTS, _handlers)
