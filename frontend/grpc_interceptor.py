"""What every RPC has in common: the key check, undecodable messages and errors as statuses."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from frontend.api_keys import ApiKeys
from pagewire.errors import Code, InvalidRequest, PagewireError, Unauthenticated

logger = logging.getLogger(__name__)

MAX_STATUS_MESSAGE = 512
"""Characters. Statuses travel in HTTP/2 headers, percent-encoded, which clients limit to 8 KiB."""

_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_WITHOUT_KEY = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request whose bytes are no such message, until the handler can answer it."""

    reason: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Raised PagewireErrors become the status of the same code; anything else unexpected is INTERNAL."""

    def __init__(self, api_keys: ApiKeys) -> None:
        self._api_keys = api_keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if not handler_call_details.method.startswith(_WITHOUT_KEY):
            metadata = dict(handler_call_details.invocation_metadata)
            try:
                self._api_keys.check(_text(metadata.get("authorization")), _text(metadata.get("x-api-key")))
            except Unauthenticated as error:
                return _refuse(error)
        if handler.request_streaming:
            return handler  # only reflection, which does its own checks
        make = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            _answering_errors(handler.unary_stream or handler.unary_unary),
            request_deserializer=_catching_undecodable(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _refuse(error: PagewireError) -> Any:
    """A handler that answers before it reads anything, whatever the kind of the method."""

    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _catching_undecodable(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def catching(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return catching


def _answering_errors(behave: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def answering(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if isinstance(request, _Undecodable):
                raise InvalidRequest(
                    f"the request is no valid protobuf message ({request.reason}); "
                    "note that string fields must be UTF-8"
                )
            return await behave(request, context)
        except PagewireError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("an RPC failed unexpectedly")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")

    return answering


async def _abort(context: grpc.aio.ServicerContext, error: PagewireError) -> None:
    message = error.message
    if len(message) > MAX_STATUS_MESSAGE:
        message = message[: MAX_STATUS_MESSAGE - 1] + "…"
    if error.code is Code.INTERNAL:
        logger.error("a request failed: %s", message)
    await context.abort(_STATUS[int(error.code)], message)
