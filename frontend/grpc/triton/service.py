"""Triton Inference Server's gRPC service over the generation pipeline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from frontend.access_log import AccessLog
from frontend.generation.pipeline import GenerationPipeline
from frontend.grpc.interceptor import Undecodable, call_id
from frontend.grpc.stall import StallWatch
from frontend.grpc.triton.messages import read_message, to_message
from frontend.grpc.triton.stream import InferStream
from frontend.triton.model import TritonModel
from frontend.triton.request import read_inference
from frontend.triton.responses import Responses
from pagewire.base.errors import Unsupported
from pagewire.triton import triton_pb2 as pb
from pagewire.triton import triton_pb2_grpc


def _unserved(what: str) -> Callable[..., Awaitable[Any]]:
    """A method that always fails with UNIMPLEMENTED."""

    async def refuse(self: TritonService, request: Any, context: grpc.aio.ServicerContext) -> None:
        raise Unsupported(f"{what} is not supported by this server")

    return refuse


class TritonService(triton_pb2_grpc.GRPCInferenceServiceServicer):
    """See protos/pagewire/triton/triton.proto. Errors are raised for the interceptor."""

    def __init__(
        self, pipeline: GenerationPipeline, model: TritonModel, access_log: AccessLog, stall_timeout: float
    ) -> None:
        """`stall_timeout`: seconds that a client may take nothing of a stream until that is given up."""
        self._pipeline = pipeline
        self._model = model
        self._access_log = access_log
        self._stall_timeout = stall_timeout

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Says that the process lives."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Says whether a request would be served."""
        return pb.ServerReadyResponse(ready=self._pipeline.ready)

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Says whether a request for a model would be served."""
        return pb.ModelReadyResponse(ready=self._model.is_ready(request.name, request.version))

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Tells what the server is."""
        return pb.ServerMetadataResponse(**self._model.server_metadata())

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Tells a model's tensors."""
        return pb.ModelMetadataResponse(**self._model.metadata(request.name, request.version))

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelConfigResponse:
        """Tells a model's configuration."""
        config = self._model.config(request.name, request.version)
        return pb.ModelConfigResponse(config=ParseDict(config, pb.ModelConfig()))

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        """Tells counts and times."""
        statistics = self._model.statistics(request.name, request.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: grpc.aio.ServicerContext
    ) -> pb.RepositoryIndexResponse:
        """Lists the models."""
        return pb.RepositoryIndexResponse(models=self._model.index(ready_only=request.ready))

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """Returns completions whole."""
        self._model.check(request.model_name, request.model_version)
        inference = read_inference(
            read_message(request),
            request_id=call_id.get(),
            streams=False,
            remaining=context.time_remaining(),
        )
        responses = Responses(inference)
        async with self._pipeline.start(inference.request) as answer:
            whole = responses.whole(await answer.whole())
        return to_message(inference.asked, whole, responses.parameters)

    async def ModelStreamInfer(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.ModelInferRequest | Undecodable],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Answers any number of requests. The client's cancel arrives here as CancelledError."""
        with StallWatch(self._stall_timeout, call_id.get()) as watch:
            stream = InferStream(self._pipeline, self._model, self._access_log, context, watch)
            await stream.answer(request_iterator)

    RepositoryModelLoad = _unserved("loading models, of which there is one,")
    RepositoryModelUnload = _unserved("unloading models, of which there is one,")
    SystemSharedMemoryStatus = _unserved("shared memory")
    SystemSharedMemoryRegister = _unserved("shared memory")
    SystemSharedMemoryUnregister = _unserved("shared memory")
    CudaSharedMemoryStatus = _unserved("shared memory of CUDA devices")
    CudaSharedMemoryRegister = _unserved("shared memory of CUDA devices")
    CudaSharedMemoryUnregister = _unserved("shared memory of CUDA devices")
    TraceSetting = _unserved("changing what is traced")
    LogSettings = _unserved("changing what is logged")
