"""Which server is measured, and how it is spoken to."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pagewire.base.errors import ConfigError

_PORTS = {"http": 80, "https": 443, "grpc": 50051, "grpcs": 50051}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server under load.

    Attributes:
        url: http(s)://host:port with or without /v1, or grpc(s)://host:port.
        model: the name to ask for; "" takes the first that the server lists.
        chat: conversations (/v1/chat/completions) instead of completions.
        headers: sent with every request, besides those it needs; over gRPC they are metadata.
        timeout: seconds that a request may take.
        ca_file: certificates to trust instead of the system's.
        insecure: whether any certificate will do.
        temperature: of the sampling.
        ignore_eos: whether every output has the length that was asked for.
        extra_body: fields that every HTTP request's body gets, or has replaced; null leaves one out.
        connections: of each process, over gRPC.
    """

    url: str
    model: str = ""
    chat: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    timeout: float = 600.0
    ca_file: Path | None = None
    insecure: bool = False
    temperature: float = 0.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    connections: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            valid = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(
                f"url is {self.url!r}; it must be http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or "
                "grpcs://HOST:PORT",
                param="url",
            )
        if (self.ca_file or self.insecure) and not self.uses_tls:
            raise ConfigError(
                "ca_file and insecure are for https:// and grpcs://; this url has no TLS", param="url"
            )
        if self.is_grpc and self.chat:
            raise ConfigError("chat is for HTTP; over gRPC prompts are token ids", param="chat")
        if self.is_grpc and self.extra_body:
            raise ConfigError("extra_body is for HTTP; gRPC requests have no JSON body", param="extra_body")

    @property
    def is_grpc(self) -> bool:
        """Whether the protocol is pagewire's gRPC."""
        return self.url.startswith("grpc")

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return urlsplit(self.url).scheme.endswith("s")

    @property
    def host(self) -> str:
        """Name or address, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """TCP port."""
        parts = urlsplit(self.url)
        return parts.port or _PORTS[parts.scheme]

    @property
    def authority(self) -> str:
        """Host and port as a Host header and a gRPC channel have them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def path(self, name: str) -> str:
        """The path of an endpoint such as "models", below the URL's own path."""
        base = urlsplit(self.url).path.rstrip("/")
        return f"{base if base.endswith('/v1') else base + '/v1'}/{name}"

    def tls(self) -> ssl.SSLContext | None:
        """The context for a connection; None where there is no TLS.

        Raises:
            ConfigError: the CA file cannot be read.
        """
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ConfigError(f"{self.ca_file}: no certificates can be read from it: {error}") from error
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def body(self, prompt: list[int] | str, max_tokens: int) -> bytes:
        """The JSON body of a streamed request over HTTP."""
        said = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        fields = {
            "model": self.model,
            **said,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            **({"ignore_eos": True} if self.ignore_eos else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_body,
        }
        kept = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(kept, separators=(",", ":")).encode()
