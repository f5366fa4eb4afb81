"""The endpoints about the server, its model and its tokens."""

from __future__ import annotations

from collections.abc import Mapping

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.endpoint import ERRORS_OF_BODIES, ERRORS_OF_QUESTIONS, Api, Endpoint, Handler
from frontend.http.operations import answers
from frontend.http.operations.bodies import (
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from frontend.http.operations.handlers import OperationHandlers
from frontend.http.operations.timelines import TimelineHandlers
from frontend.metrics import FrontendMetrics

_ENDPOINTS = (
    Endpoint(
        name="listModels",
        method="GET",
        path="/v1/models",
        tag="Models",
        summary="List the served models",
        answer=answers.ModelList,
    ),
    Endpoint(
        name="getModel",
        method="GET",
        path="/v1/models/{model}",
        tag="Models",
        summary="Tell of one served model",
        answer=answers.ModelAnswer,
        errors=(*ERRORS_OF_QUESTIONS, 404),
    ),
    Endpoint(
        name="loadAdapter",
        method="POST",
        path="/v1/load_lora_adapter",
        tag="Models",
        summary="Load a LoRA adapter, which requests then name as their model",
        description="lora_path is a directory on the server or a repository on a hub. With load_inplace it "
        "takes the place of the adapter of the same name; requests under way keep the former. Takes the "
        "key of "
        "--admin-api-key where there is one, and is served with --allow-runtime-lora only.",
        body=LoadAdapterBody,
        example={"lora_name": "sql", "lora_path": "/adapters/sql"},
        media_type="text/plain",
        errors=(*ERRORS_OF_BODIES, 501),
        needs_admin=True,
    ),
    Endpoint(
        name="unloadAdapter",
        method="POST",
        path="/v1/unload_lora_adapter",
        tag="Models",
        summary="Unload a LoRA adapter; requests under way keep it",
        body=UnloadAdapterBody,
        example={"lora_name": "sql"},
        media_type="text/plain",
        errors=(*ERRORS_OF_BODIES, 501),
        needs_admin=True,
    ),
    Endpoint(
        name="tokenize",
        method="POST",
        path="/tokenize",
        tag="Text",
        summary="Turn text or a conversation into token ids",
        body=TokenizeBody,
        example={"prompt": "The capital of France is"},
        answer=answers.TokenizeAnswer,
        errors=ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="detokenize",
        method="POST",
        path="/detokenize",
        tag="Text",
        summary="Turn token ids into text",
        body=DetokenizeBody,
        example={"tokens": [504, 3575, 282]},
        answer=answers.DetokenizeAnswer,
        errors=ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="tokenizerInfo",
        method="GET",
        path="/tokenizer_info",
        tag="Text",
        summary="The tokenizer's special tokens and the chat template",
        answer=answers.TokenizerInfo,
    ),
    Endpoint(
        name="health",
        method="GET",
        path="/health",
        tag="Operation",
        summary="The process lives",
        answer=answers.HealthAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="ping",
        method="GET",
        path="/ping",
        tag="Operation",
        summary="The process lives, by another name",
        answer=answers.HealthAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="ready",
        method="GET",
        path="/ready",
        tag="Operation",
        summary="A request sent now would be served",
        answer=answers.StatusAnswer,
        errors=(400, 503),
        needs_key=False,
    ),
    Endpoint(
        name="load",
        method="GET",
        path="/load",
        tag="Operation",
        summary="How busy the scheduler is",
        answer=answers.LoadAnswer,
        errors=(*ERRORS_OF_QUESTIONS, 503),
    ),
    Endpoint(
        name="metrics",
        method="GET",
        path="/metrics",
        tag="Operation",
        summary="Prometheus metrics",
        media_type="text/plain",
    ),
    Endpoint(
        name="getRequest",
        method="GET",
        path="/v1/requests/{id}",
        tag="Operation",
        summary="What happened to a request, and when",
        description="While it is open and some time after; only to the API key that sent it. The id is the "
        "answer's header x-request-id, or the id in its body.",
        answer=answers.TimelineAnswer,
        errors=(*ERRORS_OF_QUESTIONS, 404, 503),
    ),
    Endpoint(
        name="version",
        method="GET",
        path="/version",
        tag="Operation",
        summary="The server's version",
        answer=answers.VersionAnswer,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="serverInfo",
        method="GET",
        path="/server_info",
        tag="Operation",
        summary="The model, the engine and the limits in force",
        answer=answers.ServerInfo,
    ),
    Endpoint(
        name="docs",
        method="GET",
        path="/docs",
        tag="Documentation",
        summary="This document, for people",
        media_type="text/html",
        errors=(400,),
        needs_key=False,
    ),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    operations = OperationHandlers(config, pipeline, metrics)
    return {
        "listModels": operations.models,
        "getModel": operations.model,
        "loadAdapter": operations.load_adapter,
        "unloadAdapter": operations.unload_adapter,
        "tokenize": operations.tokenize,
        "detokenize": operations.detokenize,
        "tokenizerInfo": operations.tokenizer_info,
        "health": operations.health,
        "ping": operations.health,
        "ready": operations.ready,
        "load": operations.load,
        "metrics": operations.metrics,
        "getRequest": TimelineHandlers(pipeline).get,
        "version": operations.version,
        "serverInfo": operations.server_info,
        "docs": operations.docs,
    }


OPERATIONS = Api(_ENDPOINTS, _handlers)
