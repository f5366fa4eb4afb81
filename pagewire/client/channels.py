"""Connections of clients: addresses, TLS, retries, and the errors that calls end with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from pagewire.base.errors import ConfigError, PagewireError, from_code
from pagewire.base.tls import ClientTls
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Each client has a connection of its own, so that several spread over frontends that share a port.
    ("grpc.use_local_subchannel_pool", 1),
)


_RETRIED = ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
_MAX_RETRIES = 4  # grpc makes at most 5 attempts, whatever the policy says
_RETRY_BUFFER = 1 << 24
"""Bytes of a request that are kept to be sent again, by default 256 KiB; longer requests are sent once."""


def _retrying(max_retries: int) -> tuple[tuple[str, Any], ...]:
    """Options by which grpc itself retries (gRFC A6) calls that were answered by nothing but one of these
    statuses, after waits that double, or that the server asked for."""
    if not 0 <= max_retries <= _MAX_RETRIES:
        raise ConfigError(
            f"max_retries is {max_retries}; it must be between 0 and {_MAX_RETRIES}", param="max_retries"
        )
    if max_retries == 0:
        return ()
    policy = {
        "maxAttempts": max_retries + 1,
        "initialBackoff": "0.25s",
        "maxBackoff": "4s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": _RETRIED,
    }
    config = {"methodConfig": [{"name": [{"service": _SERVICE}], "retryPolicy": policy}]}
    return (
        ("grpc.service_config", json.dumps(config)),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER),
    )


def _target(url_or_target: str) -> str:
    if url_or_target.startswith(("http://", "https://")):
        raise ConfigError(
            f"{url_or_target} is an HTTP address; give the server's gRPC address, such as 127.0.0.1:50051"
        )
    return url_or_target.removeprefix("grpc://").removeprefix("grpcs://").rstrip("/")


def open_channel(library: Any, url_or_target: str, tls: ClientTls | None, max_retries: int) -> Any:
    """A channel of grpc or grpc.aio. What it takes, and the errors, are those of `Client`."""
    options = (*_OPTIONS, *_retrying(max_retries))
    if tls is None and url_or_target.startswith("grpcs://"):
        tls = ClientTls()
    if tls is None:
        return library.insecure_channel(_target(url_or_target), options=options)
    return library.secure_channel(_target(url_or_target), tls.credentials(), options=options)


def stub_of(channel: Any) -> inference_pb2_grpc.InferenceServiceStub:
    """The service behind a channel."""
    return inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def metadata_of(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


@contextmanager
def status_as_error() -> Iterator[None]:
    """Raises the status that ended a call as this package's error."""
    try:
        yield
    except grpc.RpcError as error:
        status = error.code()
        metadata = dict([*(error.trailing_metadata() or ())])  # pairs, though it may look like a mapping
        seconds = metadata.get("retry-after")
        raised: PagewireError = from_code(
            status.value[0],
            error.details() or status.name,
            param=metadata.get("x-param"),
            retry_after=None if seconds is None else float(seconds),
        )
        raise raised from error
