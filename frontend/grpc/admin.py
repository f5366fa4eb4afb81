"""Draining and status for the operator, on a Unix socket of this user's own.

A socket rather than a port with a key: there is nothing to guess, to leak or to rotate, and who may open it
is what the file system says. From another host it is reached as the process is: by ssh or `kubectl exec`.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc

from frontend.generation.pipeline import GenerationPipeline
from pagewire.admin.v1 import admin_pb2, admin_pb2_grpc
from pagewire.base.errors import ConfigError, PagewireError

_PROGRESS_SECONDS = 0.1


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """See protos/pagewire/admin/v1/admin.proto."""

    def __init__(self, pipeline: GenerationPipeline, drain_timeout: float) -> None:
        self._pipeline = pipeline
        self._drain_timeout = drain_timeout

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """Tells what the frontend is doing."""
        pipeline = self._pipeline
        return admin_pb2.GetStatusResponse(
            ready=pipeline.ready, draining=pipeline.draining, num_open_requests=pipeline.num_open
        )

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[admin_pb2.DrainResponse]:
        """Refuses new requests, and tells of the open ones until there are none."""
        timeout = request.timeout if request.HasField("timeout") else self._drain_timeout
        if not 0 <= timeout < math.inf:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"timeout is {timeout:g}; it must be a number from 0 on"
            )
        count: Callable[[], int] = partial(getattr, self._pipeline, "num_open")
        if request.replica:
            draining = asyncio.create_task(self._pipeline.link.drain(request.replica, timeout))
            count = partial(self._pipeline.link.num_open_at, request.replica)
        else:
            draining = asyncio.create_task(self._pipeline.drain(timeout))
        told = None
        try:
            while not draining.done():
                if (num_open := count()) != told:
                    yield admin_pb2.DrainResponse(num_open_requests=num_open)
                    told = num_open
                await asyncio.wait((draining,), timeout=_PROGRESS_SECONDS)
        finally:
            # Whoever asked may have gone; that open requests have an end was promised to others too.
            with suppress(PagewireError):
                await asyncio.shield(draining)
        if isinstance(error := draining.exception(), PagewireError):
            await context.abort(_status(error), error.message)
        yield admin_pb2.DrainResponse(drained=True, num_aborted=draining.result())

    async def Resume(  # noqa: N802
        self, request: admin_pb2.ResumeRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.ResumeResponse:
        """Gives a replica requests again."""
        try:
            self._pipeline.link.undrain(request.replica)
        except PagewireError as error:
            await context.abort(_status(error), error.message)
        return admin_pb2.ResumeResponse()


def _status(error: PagewireError) -> grpc.StatusCode:
    return next(status for status in grpc.StatusCode if status.value[0] == error.code)


class AdminServer:
    """The listening server. The socket's mode is 0600.

    Raises:
        ConfigError: the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        pipeline: GenerationPipeline,
        health: health_pb2_grpc.HealthServicer,
        drain_timeout: float,
    ) -> None:
        self._server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(  # type: ignore[no-untyped-call]
            AdminService(pipeline, drain_timeout), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        previous = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {path}: {error}", param="admin_socket") from error
        finally:
            os.umask(previous)

    async def start(self) -> None:
        """Starts serving."""
        await self._server.start()

    async def stop(self) -> None:
        """Closes it."""
        await self._server.stop(None)
