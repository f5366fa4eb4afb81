"""Ollama's endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.endpoint import ERRORS_OF_BODIES, ERRORS_OF_QUESTIONS, Api, Endpoint, Handler
from frontend.http.ollama.embeddings import OllamaEmbeddingHandlers
from frontend.http.ollama.generate import OllamaGenerateHandlers
from frontend.http.ollama.models import OllamaModelHandlers
from frontend.http.ollama.schemas import answers
from frontend.http.ollama.schemas.embeddings import OllamaEmbedBody, OllamaEmbeddingsBody
from frontend.http.ollama.schemas.generation import OllamaChatBody, OllamaGenerateBody
from frontend.http.ollama.schemas.models import OllamaPullBody, OllamaShowBody
from frontend.metrics import FrontendMetrics

_ERRORS_OF_BODIES = tuple(status for status in ERRORS_OF_BODIES if status != 429)

_HELLO = [{"role": "user", "content": "Name the capital of France."}]

_UNSERVED = (
    ("ollamaCreate", "POST", "/api/create", "Make a model"),
    ("ollamaCopy", "POST", "/api/copy", "Copy a model"),
    ("ollamaPush", "POST", "/api/push", "Upload a model"),
    ("ollamaDelete", "DELETE", "/api/delete", "Delete a model"),
    ("ollamaCreateBlob", "POST", "/api/blobs/{digest}", "Upload a file"),
)


def _endpoint(**fields: Any) -> Endpoint:
    return Endpoint(
        tag="Ollama", error=answers.OllamaError, event_media_type="application/x-ndjson", **fields
    )


_ENDPOINTS = (
    _endpoint(
        name="ollamaChat",
        method="POST",
        path="/api/chat",
        summary="Continue a conversation",
        description="A stream of lines unless `stream` is false.",
        body=OllamaChatBody,
        example={"messages": _HELLO, "options": {"num_predict": 64}, "stream": False},
        answer=answers.OllamaChatAnswer,
        event=answers.OllamaChatAnswer,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaGenerate",
        method="POST",
        path="/api/generate",
        summary="Answer a prompt, or continue it with raw: true",
        description="A stream of lines unless `stream` is false.",
        body=OllamaGenerateBody,
        example={"prompt": "Why is the sky blue?", "options": {"num_predict": 64}, "stream": False},
        answer=answers.OllamaGenerateAnswer,
        event=answers.OllamaGenerateAnswer,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaEmbed",
        method="POST",
        path="/api/embed",
        summary="Turn inputs into vectors of length 1",
        body=OllamaEmbedBody,
        example={"input": ["first text", "second text"], "pooling": "mean"},
        answer=answers.OllamaEmbedAnswer,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaEmbeddings",
        method="POST",
        path="/api/embeddings",
        summary="Turn one prompt into a vector (older form)",
        body=OllamaEmbeddingsBody,
        example={"prompt": "a text", "pooling": "mean"},
        answer=answers.OllamaEmbeddingsAnswer,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaTags",
        method="GET",
        path="/api/tags",
        summary="List the served models",
        answer=answers.OllamaModels,
    ),
    _endpoint(
        name="ollamaShow",
        method="POST",
        path="/api/show",
        summary="Tell of a served model",
        body=OllamaShowBody,
        example={"verbose": False},
        answer=answers.OllamaShowAnswer,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaRunning",
        method="GET",
        path="/api/ps",
        summary="List the models that an engine has",
        answer=answers.OllamaRunningModels,
    ),
    _endpoint(
        name="ollamaPull",
        method="POST",
        path="/api/pull",
        summary="Say that the served model is there",
        description="Other models are a 404: none is fetched. A stream of one line unless `stream` is false.",
        body=OllamaPullBody,
        example={"stream": False},
        answer=answers.OllamaStatus,
        event=answers.OllamaStatus,
        errors=_ERRORS_OF_BODIES,
    ),
    _endpoint(
        name="ollamaVersion",
        method="GET",
        path="/api/version",
        summary="The version of Ollama whose API this is",
        answer=answers.OllamaVersion,
        errors=(400,),
        needs_key=False,
    ),
    *(
        _endpoint(
            name=name,
            method=method,
            path=path,
            summary=summary,
            description="Always answers 400: this server has the model that it was started with.",
            errors=ERRORS_OF_QUESTIONS,
        )
        for name, method, path, summary in _UNSERVED
    ),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    generate = OllamaGenerateHandlers(pipeline, config.stall_timeout)
    embeddings = OllamaEmbeddingHandlers(pipeline)
    models = OllamaModelHandlers(pipeline)
    return {
        "ollamaChat": generate.chat,
        "ollamaGenerate": generate.generate,
        "ollamaEmbed": embeddings.embed,
        "ollamaEmbeddings": embeddings.embeddings,
        "ollamaTags": models.tags,
        "ollamaShow": models.show,
        "ollamaRunning": models.running,
        "ollamaPull": models.pull,
        "ollamaVersion": models.version,
        **{name: models.unserved for name, *_ in _UNSERVED},
    }


OLLAMA = Api(_ENDPOINTS, _handlers)
