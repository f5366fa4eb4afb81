"""The frontend process's configuration, resolved once at its edge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagewire.settings import require, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """What one frontend serves.

    Attributes:
        model: a directory in Hugging Face layout, a .gguf file, a Hugging Face id or an alias; only its
            tokenizer, templates and defaults are read.
        scheduler: gRPC address of the scheduler, "unix:/path" or "host:port".
        served_model_names: what requests may call the model; default its alias or directory name.
        host: address to listen on, for HTTP and gRPC.
        port: HTTP port; 0 takes a free one.
        grpc_port: gRPC port; 0 takes a free one.
        api_keys: if not empty, every request must carry one of them.
        chat_template: a Jinja file used instead of the model's own template.
        max_body_bytes: largest HTTP body or gRPC message accepted.
        reuse_port: whether several frontends share the ports (SO_REUSEPORT).
        drain_timeout: seconds that open streams get to finish after SIGTERM.
    """

    model: str
    scheduler: str
    served_model_names: tuple[str, ...] = ()
    host: str = "0.0.0.0"
    port: int = 8000
    grpc_port: int = 50051
    api_keys: tuple[str, ...] = ()
    chat_template: Path | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    reuse_port: bool = True
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of its range."""
        for name in ("port", "grpc_port"):
            value = getattr(self, name)
            require(0 <= value < 2**16, name, value, "between 0 and 65535")
        require(
            self.port == 0 or self.port != self.grpc_port,
            "grpc_port",
            self.grpc_port,
            "another port than port",
        )
        for name in self.served_model_names:
            require(name != "", "served_model_names", name, "names of at least one character")
        # A key travels in a header and in an environment variable, where white space separates keys.
        require(
            all(key and not any(character.isspace() for character in key) for key in self.api_keys),
            "api_keys",
            "an empty key or one with white space",
            "keys without white space",
        )
        require_positive(self, "max_body_bytes")
        require(self.drain_timeout >= 0, "drain_timeout", self.drain_timeout, "at least 0")
        require(
            self.chat_template is None or self.chat_template.is_file(),
            "chat_template",
            str(self.chat_template),
            "a file that exists",
        )
