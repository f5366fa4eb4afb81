"""The settings of logs and traces, which every process has."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from pagewire.base.errors import ConfigError
from pagewire.base.settings import require

LOG_FORMATS = ("text", "json")

_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
}


def otlp_protocol(endpoint: str) -> str:
    """The protocol of an OTLP endpoint: "http/protobuf" if its URL has a path, else "grpc"."""
    return "http/protobuf" if urlsplit(endpoint).path.strip("/") else "grpc"


def check_observed(config: Any) -> None:
    """Checks the fields `log_format` and `otlp_traces_endpoint`.

    Raises:
        ConfigError: a value is wrong, or OpenTelemetry's packages are not installed.
    """
    require(
        config.log_format in LOG_FORMATS,
        "log_format",
        config.log_format,
        f"one of {', '.join(LOG_FORMATS)}",
    )
    endpoint = config.otlp_traces_endpoint
    if endpoint is None:
        return
    url = urlsplit(endpoint)
    require(
        url.scheme in ("http", "https") and bool(url.hostname),
        "otlp_traces_endpoint",
        endpoint,
        "a URL such as http://localhost:4317 (gRPC) or http://localhost:4318/v1/traces (HTTP)",
    )
    if not _is_installed("opentelemetry.sdk") or not _is_installed(_EXPORTERS[otlp_protocol(endpoint)]):
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry's packages; install them with: pip install "
            "'pagewire[otel]'",
            param="otlp_traces_endpoint",
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
