"""The frontend process's configuration, resolved once at its edge."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from frontend.chat.settings import ChatSettings, ConstraintSettings, is_template
from frontend.metrics_names import CHOICES as METRICS_NAMES
from frontend.replicas.addresses import Addresses
from pagewire.base.observed import check_observed
from pagewire.base.settings import require, require_positive
from pagewire.base.tls import ClientTls, ServerTls

POOLINGS = ("last", "mean", "cls")
"""The ways to pool hidden states, by the names that options and requests use."""

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,\[\]]+|[a-z][a-z0-9+.-]*://\[[0-9a-fA-F:.]+\](:\d+)?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """What one frontend serves.

    Attributes:
        model: a directory in Hugging Face layout, a .gguf file, a model on a hub or an alias; only its
            tokenizer, templates and defaults are read, and of its weights what they are.
        scheduler: gRPC address of the scheduler, "unix:/path" or "host:port"; several with commas between
            them are replicas of one model, "dns:name:port" is every address of a name, and "file:/path" every
            line of a file; both are looked up every few seconds.
        scheduler_ssl_ca_certs: PEM file of the authorities that may have signed the scheduler's certificate;
            with it, or scheduler_ssl_certfile, the connection to a scheduler at host:port is TLS.
        scheduler_ssl_certfile: PEM file with the certificate that is shown to the scheduler (mTLS).
        scheduler_ssl_keyfile: PEM file with its private key; default the same file.
        served_model_names: what requests may call the model; default its alias or directory name.
        host: address to listen on, for HTTP and gRPC.
        port: HTTP port; 0 takes a free one.
        grpc_port: gRPC port; 0 takes a free one.
        ssl_certfile: PEM file with the servers' certificate and its chain; with it HTTP and gRPC are TLS
            only. It is read again when it changes.
        ssl_keyfile: PEM file with its private key; default the same file.
        ssl_ca_certs: PEM file of authorities; with it clients must show a certificate of one of them (mTLS).
        api_keys: if not empty, every request must carry one of them.
        api_key_file: a file with further keys, one a line; empty lines and lines that begin with # are
            skipped.
        admin_api_keys: keys for what changes the service, which is loading and unloading adapters; without
            one the keys of other requests do for that.
        chat_template: a Jinja file, or a template itself, used instead of the model's own or, where it has
            none, its family's.
        trust_request_chat_template: whether requests may bring a chat_template; each is rendered in a process
            of its own, with limits on time and memory.
        tool_call_parser: how the model writes calls of tools: harmony, chatglm3, glm4, cohere, granite,
            phi4_mini, hermes, mistral, pythonic, llama3_json, react, generic or a plugin's; auto is what its
            chat template shows, or else generic, none is not at all.
        tool_parser_plugin: a Python file that defines further tool parsers.
        reasoning_parser: how the model marks what it thinks: qwen3, deepseek_r1, mistral or cohere; auto is
            what its chat template shows, none is not at all.
        open_schemas: whether objects may have properties that their JSON Schema does not name, as its letter
            says; otherwise only where the schema says so itself.
        relax_tool_schemas: whether a tool that must be called, or is strict, and has a schema that cannot be
            enforced takes any arguments, and is not refused.
        relax_schemas: whether keywords that cannot be enforced are left out of a response_format's schema
            that is not strict; otherwise it is refused.
        pooling: how hidden states become embeddings where a request does not say: last, mean or cls; default
            the model's own way, which most models do not have.
        score_template: how a query and a document are written for a model that scores them, instead of as the
            tokenizer joins two texts: qwen3-reranker, a file, or a text, with {query} and {document} in it.
        classifier_from_token: of a model that generates and is to score pairs of texts, the token that says
            no and the one that says yes, such as no and yes, each with an option of its own.
        max_body_bytes: largest HTTP body or gRPC message accepted.
        allow_unknown_fields: whether unknown fields of HTTP bodies are ignored, with a line in the log for
            each name, instead of refused.
        max_prompt_tokens: longest prompt accepted, in tokens; default what the model's context holds.
        request_timeout: seconds that a client gets to send an HTTP request, its body included, and to begin
            one on a new connection.
        idle_timeout: seconds that an HTTP connection is kept between two requests.
        max_connections: the most connections that each protocol takes at once; beyond it new ones are
            refused.
        stall_timeout: seconds that a client may take nothing of a stream that waits for it, until the stream
            is given up.
        sse_ping_interval: seconds of silence after which a stream of server-sent events gets a comment, so
            that proxies and clients keep the connection during a long prefill; 0 is never.
        allowed_origins: origins whose pages may call the HTTP API (CORS), such as https://example.org; * is
            all of them, "none" is none.
        allowed_methods: HTTP methods that such pages may use; * is all of them.
        allowed_headers: request headers that such pages may send; * is all of them.
        allow_credentials: whether browsers may send cookies and the like with such requests.
        access_log: whether a line is logged for every request, with its id, status and time.
        enable_log_requests: whether the parameters of every request are logged.
        max_log_len: how many characters (or token ids) of its prompt are logged with them; default none.
        log_format: how logs are written: text, or json, an object a line with the ids of request and trace.
        metrics_names: what the scheduler's metrics are called in /metrics: both, pagewire, or vllm where
            vLLM has a name for them and pagewire elsewhere.
        otlp_traces_endpoint: where spans of traced requests are sent by OTLP: http://HOST:4317 by gRPC,
            http://HOST:4318/v1/traces by HTTP. Default nowhere; nothing is traced then. Needs pagewire[otel].
        otlp_traces_sample_ratio: share of the requests without a W3C traceparent that are traced; those that
            have one are traced as it says.
        admin_socket: path of a Unix socket for this user alone, on which the frontend can be drained (see
            `pagewire drain`); default none.
        max_connection_age: seconds after which a gRPC client is asked to connect anew, so that it reaches
            another frontend; calls under way go on on the old connection.
        reuse_port: whether several frontends share the ports (SO_REUSEPORT).
        drain_timeout: seconds that open streams get to finish after SIGTERM.
        reconnect_timeout: seconds that open requests wait for a scheduler that was lost, and new ones for a
            scheduler or an engine.
    """

    model: str
    scheduler: str
    scheduler_ssl_ca_certs: Path | None = None
    scheduler_ssl_certfile: Path | None = None
    scheduler_ssl_keyfile: Path | None = None
    served_model_names: tuple[str, ...] = ()
    host: str = "0.0.0.0"  # nosec B104 # a server is to be reached; SECURITY.md says what else it needs
    port: int = 8000
    grpc_port: int = 50051
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    admin_api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str = "auto"
    tool_parser_plugin: Path | None = None
    reasoning_parser: str = "auto"
    open_schemas: bool = False
    relax_tool_schemas: bool = False
    relax_schemas: bool = False
    pooling: str | None = None
    score_template: str | None = None
    classifier_from_token: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    allow_unknown_fields: bool = False
    max_prompt_tokens: int | None = None
    request_timeout: float = 60.0
    idle_timeout: float = 600.0
    max_connections: int = 16384
    stall_timeout: float = 60.0
    sse_ping_interval: float = 15.0
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    access_log: bool = True
    enable_log_requests: bool = False
    max_log_len: int = 0
    log_format: str = "text"
    metrics_names: str = "both"
    otlp_traces_endpoint: str | None = None
    otlp_traces_sample_ratio: float = 1.0
    admin_socket: Path | None = None
    max_connection_age: float = 60.0
    reuse_port: bool = True
    drain_timeout: float = 30.0
    reconnect_timeout: float = 30.0

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
            all(
                key and not any(character.isspace() for character in key)
                for key in (*self.api_keys, *self.admin_api_keys)
            ),
            "api_keys",
            "an empty key or one with white space",
            "keys without white space",
        )
        require(self.pooling in (None, *POOLINGS), "pooling", self.pooling, f"one of {', '.join(POOLINGS)}")
        require(
            len(self.classifier_from_token) in (0, 2),
            "classifier_from_token",
            self.classifier_from_token,
            "two tokens: the one that says no and the one that says yes",
        )
        require(
            not self.classifier_from_token or self.score_template is not None,
            "score_template",
            self.score_template,
            "given with classifier_from_token, such as qwen3-reranker: it asks what the tokens answer",
        )
        Addresses.parse(self.scheduler)
        require_positive(self, "max_body_bytes", "max_prompt_tokens", "max_connections")
        require(self.idle_timeout > 0, "idle_timeout", self.idle_timeout, "more than 0")
        age = self.max_connection_age
        require(0 < age < 10**6, "max_connection_age", age, "more than 0 and less than 1000000")
        require(self.request_timeout > 0, "request_timeout", self.request_timeout, "more than 0")
        require(self.stall_timeout > 0, "stall_timeout", self.stall_timeout, "more than 0")
        require(
            0 <= self.sse_ping_interval < 10**6,
            "sse_ping_interval",
            self.sse_ping_interval,
            "at least 0 and less than 1000000",
        )
        require(self.max_log_len >= 0, "max_log_len", self.max_log_len, "at least 0")
        check_observed(self)
        require(
            self.metrics_names in METRICS_NAMES,
            "metrics_names",
            self.metrics_names,
            f"one of {', '.join(METRICS_NAMES)}",
        )
        ratio = self.otlp_traces_sample_ratio
        require(0 <= ratio <= 1, "otlp_traces_sample_ratio", ratio, "between 0 and 1")
        self._check_cors()
        require(self.drain_timeout >= 0, "drain_timeout", self.drain_timeout, "at least 0")
        require(self.reconnect_timeout >= 0, "reconnect_timeout", self.reconnect_timeout, "at least 0")
        for name in ("tool_parser_plugin", "api_key_file"):
            path = getattr(self, name)
            require(path is None or path.is_file(), name, str(path), "a file that exists")
        template = self.chat_template
        require(
            template is None or is_template(template) or Path(template).is_file(),
            "chat_template",
            template,
            "a file that exists, or a Jinja template",
        )

    def tls(self) -> ServerTls | None:
        """How clients are talked to; None for plainly.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        return ServerTls.of(self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)

    @property
    def leave_timeout(self) -> float:
        """Seconds in which a frontend that another one replaces has ended."""
        return self.max_connection_age * 1.2 + self.drain_timeout

    def scheduler_tls(self) -> ClientTls | None:
        """How the scheduler is talked to; None for plainly, as over a Unix socket always.

        Raises:
            ConfigError: a key has no certificate.
        """
        files = (self.scheduler_ssl_ca_certs, self.scheduler_ssl_certfile, self.scheduler_ssl_keyfile)
        if not any(files) or all(each.startswith("unix:") for each in self.scheduler.split(",")):
            return None
        ca_certs, certfile, keyfile = files
        return ClientTls(ca_certs=ca_certs, certfile=certfile, keyfile=keyfile, prefix="scheduler_ssl")

    def chat(self) -> ChatSettings:
        """What concerns conversations."""
        return ChatSettings(
            template=self.chat_template,
            trust_request_template=self.trust_request_chat_template,
            tool_call_parser=self.tool_call_parser,
            tool_parser_plugin=self.tool_parser_plugin,
            reasoning_parser=self.reasoning_parser,
        )

    def constraints(self) -> ConstraintSettings:
        """What concerns answers that are held to a form."""
        return ConstraintSettings(
            open_schemas=self.open_schemas,
            relax_tool_schemas=self.relax_tool_schemas,
            relax_schemas=self.relax_schemas,
        )

    def _check_cors(self) -> None:
        for origin in self.allowed_origins:
            require(
                origin in ("*", "none", "null") or _ORIGIN.fullmatch(origin) is not None,
                "allowed_origins",
                origin,
                "*, none, null or an origin such as https://example.org:8080, each with an option of its own",
            )
        for name in ("allowed_methods", "allowed_headers"):
            for value in getattr(self, name):
                require(
                    _TOKEN.fullmatch(value) is not None,
                    name,
                    value,
                    "* or a name, each with an option of its own",
                )
        require(
            not (self.allow_credentials and "*" in self.allowed_origins),
            "allow_credentials",
            True,
            "used with allowed_origins other than *: otherwise any page could act as the user",
        )
