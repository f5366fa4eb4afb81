"""What every RPC has in common: the key check, undecodable messages and errors as statuses."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from frontend.access_log import AccessLog
from frontend.api_keys import ApiKeys
from frontend.caller import set_caller
from frontend.generation.request import check_request_id
from frontend.tracing import FrontendTracing
from frontend.triton.request import id_for_logs
from pagewire.base.errors import Code, InvalidRequest, PagewireError, Unauthenticated
from pagewire.telemetry.context import TRACEPARENT, TRACESTATE, RequestContext
from pagewire.telemetry.spans import Attributes
from pagewire.triton import triton_pb2
from pagewire.triton.triton_pb2 import ModelInferRequest

logger = logging.getLogger(__name__)

TRITON_SERVICE_NAME = triton_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

MAX_STATUS_MESSAGE = 512
"""Characters. Statuses travel in HTTP/2 headers, percent-encoded, which clients limit to 8 KiB."""

MAX_PARAM = 256
"""Characters of a field's name, which may be the client's own, in metadata; a longer one is cut off."""

REQUEST_ID_METADATA = "x-request-id"
"""Metadata that may name a request whose message does not, and that tells every call's id at its end."""

PARAM_METADATA = "x-param"
"""Trailing metadata of an error: the request's field at fault."""

RETRY_AFTER_METADATA = "retry-after"
"""Trailing metadata of an error: seconds after which the same request is likely to be taken."""

RETRY_PUSHBACK_METADATA = "grpc-retry-pushback-ms"
"""The same in the form that gRPC clients with a retry policy obey (gRFC A6)."""

call_id: ContextVar[str] = ContextVar("call_id", default="")
"""The id of the call that this task answers."""

_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_TRITON = f"/{TRITON_SERVICE_NAME}/"
_WITHOUT_KEY = ("/grpc.health.v1.Health/", f"{_TRITON}ServerLive", f"{_TRITON}ServerReady")
_ADMIN = ("/LoadAdapter", "/UnloadAdapter")
_LOGGED = ("/pagewire.", f"{_TRITON}ModelInfer", f"{_TRITON}ModelStreamInfer")
"""Beginnings of the methods that are worth a line each in the log."""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands for a request whose bytes are no such message, until the handler can answer it."""

    reason: str

    def error(self) -> InvalidRequest:
        """What to answer."""
        return InvalidRequest(
            f"the request is no valid protobuf message ({self.reason}); note that string fields must be UTF-8"
        )


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Raised PagewireErrors become the status of the same code; anything else unexpected is INTERNAL.

    Every call of the inference service ends with trailing metadata "x-request-id" and a line in the log.
    """

    def __init__(
        self, api_keys: ApiKeys, access_log: AccessLog, tracing: FrontendTracing, admin: ApiKeys | None = None
    ) -> None:
        """`admin`: the keys for what changes the service; None for those of all requests."""
        self._api_keys = api_keys
        self._admin_keys = admin or api_keys
        self._access_log = access_log
        self._tracing = tracing

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata)
        traceparent, tracestate = _text(metadata.get(TRACEPARENT)), _text(metadata.get(TRACESTATE))
        call = _Call(
            method,
            _text(metadata.get(REQUEST_ID_METADATA)),
            self._access_log,
            self._tracing,
            (traceparent, tracestate),
        )
        if not method.startswith(_WITHOUT_KEY):
            authorization, x_api_key = _text(metadata.get("authorization")), _text(metadata.get("x-api-key"))
            try:
                keys = self._admin_keys if method.endswith(_ADMIN) else self._api_keys
                call.caller = keys.check(authorization, x_api_key)
            except Unauthenticated as error:
                return call.refuse(error)
        behave = handler.stream_stream or handler.unary_stream or handler.unary_unary
        if handler.request_streaming and not method.startswith(_TRITON):
            behave = _writing(behave)  # only reflection is written as a generator
        make = grpc.unary_unary_rpc_method_handler
        if handler.request_streaming:
            make = grpc.stream_stream_rpc_method_handler
        elif handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
        return make(
            call.answering(behave),
            request_deserializer=_catching_undecodable(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


@dataclass(slots=True)
class _Call:
    """One call: what is told of it when it ends.

    Attributes:
        offered_id: what the metadata call the request.
        caller_trace: the caller's traceparent and tracestate.
        request_id: its id, once it is known.
        peer: the client's address, which the library forgets when the client leaves.
        caller: whose it is; see frontend/caller.py.
        context: the context of its task, once that runs.
    """

    method: str
    offered_id: str | None
    access_log: AccessLog
    tracing: FrontendTracing
    caller_trace: tuple[str | None, str | None]
    context: RequestContext | None = None
    request_id: str = ""
    peer: str = ""
    caller: str = ""
    began: float = field(default_factory=time.perf_counter)

    def answering(self, behave: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The handler, with what it raises answered as a status."""

        async def answering(request: Any, context: grpc.aio.ServicerContext) -> Any:
            set_caller(self.caller)
            self._begin()
            try:
                self._identify(request, context)
                call_id.set(self.request_id)
                if isinstance(request, Undecodable):
                    raise request.error()
                answer = await behave(request, context)
                self._log("OK")
                return answer
            except PagewireError as error:
                self._log(error.code.name)
                await _abort(context, self.request_id, error)
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                self._log("client closed")
                raise
            except grpc.aio.InternalError as error:  # nothing can be sent any more
                self._log("client closed")
                raise asyncio.CancelledError("the call has ended") from error
            except Exception:
                logger.exception("request %s failed unexpectedly", self.request_id)
                self._log("INTERNAL")
                text = "internal error; the server's log has the details"
                await _end(context, grpc.StatusCode.INTERNAL, text, ())

        return answering

    def refuse(self, error: PagewireError) -> Any:
        """A handler that answers before it reads anything, whatever the kind of the method."""

        async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
            self._begin()
            self._identify(None, context)
            self._log(error.code.name)
            await _abort(context, self.request_id, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    @property
    def _is_probe(self) -> bool:
        return not self.method.startswith(_LOGGED) or self.method.endswith("/GetLoad")

    def _begin(self) -> None:
        self.context = self.tracing.begin(self.request_id, *self.caller_trace, traced=not self._is_probe)

    def _identify(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        """Decides on the request's id, and gives it to a message that could name it and does not.

        Raises:
            InvalidRequest: the id offered is too long or does not print.
        """
        self.peer = context.peer()
        own = getattr(request, "request_id", None)
        self.request_id = check_request_id(None)
        if isinstance(request, ModelInferRequest) and request.id and not self.offered_id:
            self.offered_id = id_for_logs(request.id)
        try:
            self.request_id = check_request_id(own or self.offered_id)
        finally:
            context.set_trailing_metadata(((REQUEST_ID_METADATA, self.request_id),))
            if self.context is not None:
                self.context.request_id = self.request_id
        if own == "":
            request.request_id = self.request_id

    def _log(self, outcome: str) -> None:
        self.access_log.ended(
            self.request_id, self.peer, self.method, outcome, self.began, probe=self._is_probe
        )
        if self.context is not None and self.context.trace is not None:
            service, _, method = self.method[1:].rpartition("/")
            attributes: Attributes = {
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "rpc.grpc.status": outcome,
            }
            self.tracing.ended(self.context, self.method[1:], attributes, "" if outcome == "OK" else outcome)


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _catching_undecodable(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def catching(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return catching


def _writing(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., Awaitable[Any]]:
    """A handler that writes what a generator yields for requests. The library would do so too, and log a
    traceback for every call that has ended meanwhile."""

    async def decodable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, Undecodable):
                raise request.error()
            yield request

    async def write(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        async for response in generate(decodable(requests), context):
            await context.write(response)

    return write


async def _abort(context: grpc.aio.ServicerContext, request_id: str, error: PagewireError) -> None:
    message = error.message
    if len(message) > MAX_STATUS_MESSAGE:
        message = message[: MAX_STATUS_MESSAGE - 1] + "…"
    if error.code is Code.INTERNAL:
        logger.error("request %s failed: %s", request_id, message)
    metadata = [(REQUEST_ID_METADATA, request_id)]
    if error.param:
        # Metadata are printable ASCII, or the call ends as an internal error.
        param = error.param[:MAX_PARAM].encode("unicode_escape").decode()
        metadata.append((PARAM_METADATA, param[:MAX_PARAM]))
    if error.retry_after is not None:
        seconds = math.ceil(error.retry_after)
        metadata += [(RETRY_AFTER_METADATA, str(seconds)), (RETRY_PUSHBACK_METADATA, str(1000 * seconds))]
    await _end(context, _STATUS[int(error.code)], message, tuple(metadata))


async def _end(
    context: grpc.aio.ServicerContext,
    status: grpc.StatusCode,
    message: str,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    """Ends a call with a status.

    Raises:
        AbortError: always, as the library has it, unless
        CancelledError: the call has ended already, of which its task may not have been told yet.
    """
    try:
        await context.abort(status, message, metadata)
    except grpc.aio.InternalError as ended:
        raise asyncio.CancelledError("the call has ended") from ended
