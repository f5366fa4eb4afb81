"""pagewire's gRPC with a stream of tokens at set times, for what measures servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import grpc

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc

Behaviour = Literal["answer", "refuse", "break off", "cancel", "hang", "no models"]


@dataclass
class GrpcStreamServer(inference_pb2_grpc.InferenceServiceServicer):
    """Listens on 127.0.0.1. A context manager.

    Attributes:
        first, gap: seconds from a request to its first token, and between tokens.
        certificate: a PEM file with the key, then the certificate; None listens without TLS.
        requests: what it was sent; `metadata`, what came with them; `peers`, from which connections.
    """

    first: float = 0.0
    gap: float = 0.0
    behaviour: Behaviour = "answer"
    certificate: Path | None = None
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._ended = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(32))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        if self.certificate is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = self.certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([(pair, pair[pair.index(b"-----BEGIN CERT") :])])
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.url = f"grpc{'s' * (self.certificate is not None)}://127.0.0.1:{self.port}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.stop(0).wait()

    def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        names = [] if self.behaviour == "no models" else ["first", "second"]
        return pb.ListModelsResponse(models=[pb.Model(id=name) for name in names])

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        if self.behaviour == "refuse":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        if self.behaviour == "cancel":
            context.abort(grpc.StatusCode.CANCELLED, "nobody wants it")
        if self.behaviour == "hang":
            self._ended.wait()
            return
        time.sleep(self.first)
        count = request.sampling.max_tokens
        for number in range(count):
            if number:
                time.sleep(self.gap)
            if number == 2 and self.behaviour == "break off":
                return
            yield pb.GenerateResponse(delta=pb.Delta(token_ids=[number]))
        usage = pb.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=count)
        finished = pb.Finished(finish_reason=pb.FINISH_REASON_LENGTH, usage=usage)
        yield pb.GenerateResponse(finished=finished)
