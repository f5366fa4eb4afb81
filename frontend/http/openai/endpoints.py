"""OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.endpoint import ERRORS_OF_BODIES, Api, Endpoint, Handler
from frontend.http.openai.embeddings import EmbeddingHandlers
from frontend.http.openai.generate import GenerateHandlers
from frontend.http.openai.responses import ResponseHandlers
from frontend.http.openai.schemas import answers
from frontend.http.openai.schemas.chat import ChatCompletionBody
from frontend.http.openai.schemas.completion import CompletionBody
from frontend.http.openai.schemas.embeddings import EmbeddingBody
from frontend.http.openai.schemas.responses import ResponsesBody
from frontend.metrics import FrontendMetrics

_HELLO = [{"role": "user", "content": "Name the capital of France."}]

_NOT_STORED = "Always answers 404: this server stores no responses."

_ENDPOINTS = (
    Endpoint(
        name="createChatCompletion",
        method="POST",
        path="/v1/chat/completions",
        tag="Generation",
        summary="Continue a conversation",
        body=ChatCompletionBody,
        example={"messages": _HELLO, "max_tokens": 64},
        answer=answers.ChatCompletion,
        event=answers.ChatCompletionChunk,
        errors=ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="createCompletion",
        method="POST",
        path="/v1/completions",
        tag="Generation",
        summary="Continue texts or token ids",
        body=CompletionBody,
        example={"prompt": "The capital of France is", "max_tokens": 16},
        answer=answers.TextCompletion,
        event=answers.TextCompletion,
        errors=ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="createResponse",
        method="POST",
        path="/v1/responses",
        tag="Generation",
        summary="Answer an input of items",
        description="OpenAI's Responses API with nothing stored: each request has the whole conversation.",
        body=ResponsesBody,
        example={"input": "Name the capital of France.", "max_output_tokens": 64},
        answer=answers.ResponseAnswer,
        event=answers.ResponseEvent,
        errors=ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="getResponse",
        method="GET",
        path="/v1/responses/{id}",
        tag="Generation",
        summary="Get a stored response",
        description=_NOT_STORED,
        errors=(400, 401, 404),
    ),
    Endpoint(
        name="deleteResponse",
        method="DELETE",
        path="/v1/responses/{id}",
        tag="Generation",
        summary="Delete a stored response",
        description=_NOT_STORED,
        errors=(400, 401, 404),
    ),
    Endpoint(
        name="createEmbedding",
        method="POST",
        path="/v1/embeddings",
        tag="Embeddings",
        summary="Turn inputs into vectors",
        description="From the model's hidden states: as the model was made for it, or as `pooling` says.",
        body=EmbeddingBody,
        example={"input": ["first text", "second text"], "pooling": "mean"},
        answer=answers.EmbeddingList,
        errors=ERRORS_OF_BODIES,
    ),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    generate = GenerateHandlers(pipeline, config.stall_timeout)
    responses = ResponseHandlers(pipeline, config.stall_timeout)
    return {
        "createChatCompletion": generate.chat_completions,
        "createCompletion": generate.completions,
        "createResponse": responses.create,
        "getResponse": responses.stored,
        "deleteResponse": responses.stored,
        "createEmbedding": EmbeddingHandlers(pipeline).embeddings,
    }


OPENAI = Api(_ENDPOINTS, _handlers)
