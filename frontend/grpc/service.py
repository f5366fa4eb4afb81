"""The public gRPC API over the generation pipeline."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from frontend.access_log import AccessLog
from frontend.api_keys import ApiKeys, admin_keys
from frontend.caller import client_of
from frontend.config import FrontendConfig
from frontend.generation.answer import Answer
from frontend.generation.constraints import in_a_line
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import (
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
    check_request_id,
    resolve_sampling,
)
from frontend.grpc.answer import AnswerMessages
from frontend.grpc.conversation import read_conversation
from frontend.grpc.embedding import answer_embed
from frontend.grpc.interceptor import TRITON_SERVICE_NAME, ErrorInterceptor
from frontend.grpc.reflection import reflection_pool
from frontend.grpc.scoring import answer_classify, answer_score
from frontend.grpc.stall import StallWatch
from frontend.grpc.triton.service import TritonService
from frontend.listeners import num_connections, stop_listening
from frontend.metrics import FrontendMetrics
from frontend.tracing import FrontendTracing
from frontend.triton.model import TritonModel
from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.base.tls import ReloadingTls
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc
from pagewire.triton import triton_pb2, triton_pb2_grpc
from pagewire.wire.sampling_messages import given_fields

RELAXED_METADATA = "x-pagewire-relaxed-schemas"
"""Initial metadata: the tools, as tools.NAME, whose schemas are not enforced, separated by commas."""
MAX_PENDING_CALLS = 1 << 16
SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Translates messages; everything else is the pipeline's. Errors are raised for the interceptor."""

    def __init__(self, pipeline: GenerationPipeline, stall_timeout: float) -> None:
        """`stall_timeout`: seconds that a client may take nothing of a stream until that is given up."""
        self._pipeline = pipeline
        self._stall_timeout = stall_timeout
        self._model = pipeline.model

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Streams a completion. The client's cancel and deadline arrive here as CancelledError."""
        async with self._pipeline.start(self._request(request, context)) as answer:
            await _tell_relaxed(context, answer)
            messages = AnswerMessages(self._model.tokenizer, answer, request)
            with StallWatch(self._stall_timeout, answer.request_id) as watch:
                async with aclosing(answer.rounds()) as rounds:
                    async for events in rounds:
                        for response in messages.responses(events):
                            await watch.write(context, response)
                await watch.write(context, messages.finished())

    async def GenerateOnce(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateOnceResponse:
        """Returns completions whole."""
        async with self._pipeline.start(self._request(request, context)) as answer:
            await _tell_relaxed(context, answer)
            return AnswerMessages(self._model.tokenizer, answer, request).whole(await answer.whole())

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        """Tokenizes text or messages."""
        self._model.check_name(request.model)
        prompt = _prompt(request, ("text", "messages"))
        assert not isinstance(prompt, TokenPrompt)
        facts = self._pipeline.link.model
        return inference_pb2.TokenizeResponse(
            token_ids=await self._pipeline.tokenize(prompt),
            max_model_len=0 if facts is None else facts.max_model_len,
        )

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        """Turns ids into text."""
        self._model.check_name(request.model)
        text = await self._pipeline.detokenize(
            request.token_ids, skip_special_tokens=request.skip_special_tokens
        )
        return inference_pb2.DetokenizeResponse(text=text)

    async def Embed(  # noqa: N802
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.EmbedResponse:
        """Turns inputs into vectors."""
        return await answer_embed(self._pipeline, request, context)

    async def Classify(  # noqa: N802
        self, request: inference_pb2.ClassifyRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ClassifyResponse:
        """Classifies inputs."""
        return await answer_classify(self._pipeline, request, context)

    async def Score(  # noqa: N802
        self, request: inference_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ScoreResponse:
        """Scores pairs of texts."""
        return await answer_score(self._pipeline, request, context)

    async def LoadAdapter(  # noqa: N802
        self, request: inference_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.LoadAdapterResponse:
        """Loads an adapter."""
        if request.lora_name in self._model.names:
            raise InvalidRequest(
                f"{request.lora_name!r} is the model's own name; an adapter needs another", param="lora_name"
            )
        await self._pipeline.link.load_adapter(
            request.lora_name, request.lora_path, in_place=request.load_inplace
        )
        return inference_pb2.LoadAdapterResponse()

    async def UnloadAdapter(  # noqa: N802
        self, request: inference_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.UnloadAdapterResponse:
        """Unloads an adapter."""
        await self._pipeline.link.unload_adapter(request.lora_name)
        return inference_pb2.UnloadAdapterResponse()

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        """Lists the served model under each of its names."""
        facts = self._pipeline.link.model
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    id=name,
                    created=self._model.created,
                    parent="" if name in self._model.names else self._model.names[0],
                    max_model_len=0 if facts is None else facts.max_model_len,
                    vocab_size=self._model.tokenizer.vocab_size if facts is None else facts.vocab_size,
                )
                for name in self._model.all_names
            ]
        )

    async def GetLoad(  # noqa: N802
        self, request: inference_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetLoadResponse:
        """Reports the scheduler's load."""
        load = await self._pipeline.link.get_load()
        return inference_pb2.GetLoadResponse(
            num_requests_running=load.num_requests_running,
            num_requests_waiting=load.num_requests_waiting,
            kv_cache_usage=load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0,
            max_num_seqs=load.max_num_seqs,
            max_num_waiting=load.max_num_waiting,
        )

    def _request(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> GenerationRequest:
        return GenerationRequest(
            request_id=check_request_id(request.request_id),
            model=request.model,
            prompts=[_prompt(request, ("text", "token_ids", "messages"))],
            sampling=resolve_sampling(self._model.defaults, given_fields(request.sampling)),
            priority=request.priority,
            client=client_of(request.user),
            timeout=_timeout(request, context),
            cache_salt=request.cache_salt,
            truncate_prompt_tokens=(
                request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
            ),
            echo=request.echo,
        )


async def _tell_relaxed(context: grpc.aio.ServicerContext, answer: Answer) -> None:
    if answer.relaxed:
        await context.send_initial_metadata(((RELAXED_METADATA, in_a_line(answer.relaxed)),))


def _prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, choices: tuple[str, ...]
) -> Prompt:
    kind = request.WhichOneof("prompt")
    add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else True
    if kind == "text":
        return TextPrompt(text=request.text, add_special_tokens=add_special_tokens)
    if kind == "messages":
        return read_conversation(request.messages)
    if kind == "token_ids" and isinstance(request, inference_pb2.GenerateRequest):
        return TokenPrompt(token_ids=list(request.token_ids.ids))
    raise InvalidRequest(f"the request has no prompt; set one of {', '.join(choices)}", param="prompt")


def _timeout(request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> float | None:
    """The sooner of the request's own timeout and the call's deadline."""
    remaining = context.time_remaining()
    own = request.timeout if request.HasField("timeout") else None
    if remaining is None or math.isinf(remaining):
        return own
    # A NaN must reach the check of its value, so it may not lose the comparison.
    return remaining if own is None or own > remaining else own


class GrpcServer:
    """The listening server: the inference service, Triton's, health and reflection.

    Attributes:
        port: the port it listens on.
        health: what it tells of itself (grpc.health.v1).
    """

    def __init__(
        self,
        config: FrontendConfig,
        pipeline: GenerationPipeline,
        metrics: FrontendMetrics,
        access_log: AccessLog,
        tracing: FrontendTracing,
        tls: ReloadingTls | None = None,
    ) -> None:
        self._pipeline = pipeline
        self.health = health.aio.HealthServicer()
        self._reports: set[asyncio.Task[None]] = set()
        keys = ApiKeys.load(config.api_keys, config.api_key_file)
        self._server = grpc.aio.server(
            interceptors=(
                ErrorInterceptor(keys, access_log, tracing, admin=admin_keys(config.admin_api_keys, keys)),
            ),
            options=_options(config),
        )
        service = InferenceService(pipeline, config.stall_timeout)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        triton = TritonService(
            pipeline, TritonModel(pipeline, metrics.inferences), access_log, config.stall_timeout
        )
        triton_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        names = (SERVICE_NAME, TRITON_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        files = (
            inference_pb2.DESCRIPTOR,
            triton_pb2.DESCRIPTOR,
            health_pb2.DESCRIPTOR,
            reflection_pb2.DESCRIPTOR,
        )
        reflection.enable_server_reflection(names, self._server, pool=reflection_pool(*files))
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            self.port: int = (
                self._server.add_insecure_port(address)
                if tls is None
                else self._server.add_secure_port(address, tls.grpc_credentials())
            )
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address} for gRPC: {error}") from error

    async def start(self) -> None:
        """Starts serving, health included."""
        await self._server.start()
        self.report_health()

    def report_health(self) -> None:
        """Tells health watchers whether a request would be served now."""
        report = asyncio.create_task(self._set_health())
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _set_health(self) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self._pipeline.ready
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", SERVICE_NAME, TRITON_SERVICE_NAME):
            await self.health.set(service, status)

    def stop_listening(self) -> None:
        """Closes the port, and no connection. Clients are told to make new ones as theirs get old."""
        stop_listening(self.port)

    def num_connections(self) -> int:
        """How many clients are connected."""
        return num_connections(self.port)

    async def stop(self, grace: float) -> None:
        """Closes the port; calls still open get `grace` seconds."""
        await self._server.stop(grace)


def _options(config: FrontendConfig) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", int(config.reuse_port)),
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        # A long generation is a quiet call: clients may ping through it, and dead ones are found.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Calls that have come and were not looked at yet. Beyond a thousand the library would cancel some at
        # random; the pipeline refuses with a reason.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.server_handshake_timeout_ms", round(config.request_timeout * 1000)),
        # Clients connect anew now and then, to whichever frontend listens then, without losing a call.
        ("grpc.max_connection_age_ms", round(config.max_connection_age * 1000)),
    )
