"""Triton Inference Server's endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.endpoint import Api, Endpoint, Handler
from frontend.http.triton import answers
from frontend.http.triton.bodies import GenerateBody, IndexBody, InferBody
from frontend.http.triton.handlers import TritonHandlers
from frontend.metrics import FrontendMetrics
from frontend.triton.model import TritonModel

_TAG = "Triton"
_ERROR = answers.TritonErrorAnswer
_ERRORS_OF_BODIES = (400, 401, 403, 404, 408, 413, 415, 500, 501, 503)
_ERRORS_OF_QUESTIONS = (400, 401, 404, 500)
_EXAMPLE = {"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}

_MODEL_ENDPOINTS = (
    Endpoint(
        name="tritonGenerate",
        method="POST",
        path="/generate",
        tag=_TAG,
        summary="Continue a text",
        body=GenerateBody,
        example=_EXAMPLE,
        answer=answers.GenerateAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="tritonGenerateStream",
        method="POST",
        path="/generate_stream",
        tag=_TAG,
        summary="Continue a text, event by event",
        description="With `stream: true` an event for each delta, else one for each completion.",
        body=GenerateBody,
        example={**_EXAMPLE, "stream": True},
        media_type="text/event-stream",
        event=answers.GenerateAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="tritonInfer",
        method="POST",
        path="/infer",
        tag=_TAG,
        summary="Continue texts, in tensors",
        body=InferBody,
        example={
            "inputs": [
                {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["Once upon a time"]},
                {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [20]},
            ]
        },
        answer=answers.InferAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_BODIES,
    ),
    Endpoint(
        name="tritonModelReady",
        method="GET",
        path="/ready",
        tag=_TAG,
        summary="A request for this model would be served",
        media_type="text/plain",
        error=_ERROR,
        errors=_ERRORS_OF_QUESTIONS,
    ),
    Endpoint(
        name="tritonModelConfig",
        method="GET",
        path="/config",
        tag=_TAG,
        summary="A model's configuration",
        answer=answers.ModelConfigAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_QUESTIONS,
    ),
    Endpoint(
        name="tritonModelStatistics",
        method="GET",
        path="/stats",
        tag=_TAG,
        summary="Counts and times of a model's requests",
        answer=answers.StatisticsAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_QUESTIONS,
    ),
    Endpoint(
        name="tritonModel",
        method="GET",
        path="",
        tag=_TAG,
        summary="A model's tensors",
        answer=answers.ModelMetadataAnswer,
        error=_ERROR,
        errors=_ERRORS_OF_QUESTIONS,
        # A path that ends in one of the others is that one's, by any method: another method is a 405.
        model_pattern="(?!.*/(?:generate|generate_stream|infer|ready|config|stats)$).+",
    ),
)
"""What there is of a model, and of a version of it. Paths are what follows their names."""

_SERVER_ENDPOINTS = (
    Endpoint(
        name="tritonServer",
        method="GET",
        path="/v2",
        tag=_TAG,
        summary="The server's name, version and extensions of the protocol",
        answer=answers.ServerMetadataAnswer,
        error=_ERROR,
        errors=(400, 401, 500),
    ),
    Endpoint(
        name="tritonLive",
        method="GET",
        path="/v2/health/live",
        tag=_TAG,
        summary="The process lives",
        media_type="text/plain",
        error=_ERROR,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="tritonReady",
        method="GET",
        path="/v2/health/ready",
        tag=_TAG,
        summary="A request sent now would be served",
        media_type="text/plain",
        error=_ERROR,
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="tritonStatistics",
        method="GET",
        path="/v2/models/stats",
        tag=_TAG,
        summary="Counts and times of all models' requests",
        answer=answers.StatisticsAnswer,
        error=_ERROR,
        errors=(400, 401, 500),
    ),
    Endpoint(
        name="tritonIndex",
        method="POST",
        path="/v2/repository/index",
        tag=_TAG,
        summary="List the models",
        body=IndexBody,
        example={"ready": True},
        answer=answers.IndexAnswer,
        error=_ERROR,
        errors=(400, 401, 403, 408, 413, 415, 500),
    ),
)


def _of_model(endpoint: Endpoint) -> tuple[Endpoint, Endpoint]:
    """An endpoint of a model, of a version of it first: its path is the more special one."""
    return (
        replace(
            endpoint,
            name=f"{endpoint.name}Version",
            path=f"/v2/models/{{model}}/versions/{{version}}{endpoint.path}",
            summary=f"{endpoint.summary} (of a version)",
        ),
        replace(endpoint, path=f"/v2/models/{{model}}{endpoint.path}"),
    )


_ENDPOINTS = (
    *_SERVER_ENDPOINTS,
    *(each for endpoint in _MODEL_ENDPOINTS for each in _of_model(endpoint)),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    triton = TritonHandlers(pipeline, TritonModel(pipeline, metrics.inferences), config.stall_timeout)
    of_model: dict[str, Handler] = {
        "tritonGenerate": triton.generate,
        "tritonGenerateStream": triton.generate_stream,
        "tritonInfer": triton.infer,
        "tritonModelReady": triton.model_ready,
        "tritonModelConfig": triton.config,
        "tritonModelStatistics": triton.statistics,
        "tritonModel": triton.metadata,
    }
    return {
        "tritonServer": triton.server_metadata,
        "tritonLive": triton.live,
        "tritonReady": triton.ready,
        "tritonStatistics": triton.statistics,
        "tritonIndex": triton.index,
        **of_model,
        **{f"{name}Version": handler for name, handler in of_model.items()},
    }


TRITON = Api(_ENDPOINTS, _handlers)
