"""The scheduler process's configuration, resolved once at its edge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagewire.base.observed import check_observed
from pagewire.base.settings import require, require_positive
from pagewire.base.tls import ServerTls
from scheduler.kv_events_config import KvEventsConfig
from scheduler.settings import INFLIGHT, CoreSettings

_BATCH_DELAYS = {"static": 1.0, "dynamic": 0.0}
"""Seconds that a request waits for others to fill its batch, by strategy; with the others none waits."""


DEFAULT_NAME = "default-lora"
"""What ms-swift calls an adapter that was given no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one scheduler serves. None means: as the worker reports.

    Attributes:
        listen: gRPC addresses, each "unix:/path" or "host:port".
        ssl_certfile: PEM file with the certificate for frontends that connect over TCP, and its chain; with
            it these connections are TLS only. It is read again when it changes.
        ssl_keyfile: PEM file with its private key; default the same file.
        ssl_ca_certs: PEM file of authorities; with it such frontends must show a certificate of one (mTLS).
        worker_socket: control socket of the engine-worker it drives; it waits for the worker to appear.
        max_num_seqs: the most requests computed at once; at most the worker's.
        max_num_batched_tokens: the most tokens computed in a step; at most the worker's.
        max_num_waiting: the most requests that may wait; beyond it new ones are refused.
        enable_prefix_caching: whether full blocks are kept and shared by content.
        target_itl_ms: milliseconds that running streams may wait for their next token because prompts are
            computed; default as long as max_num_batched_tokens take.
        batching_strategy: "inflight": requests join and leave the others at every step. To compare with it:
            "none", one request at a time; "static" and "dynamic", batches of max_num_seqs requests, which no
            request joins before they are over.
        max_queue_delay_microseconds: with static and dynamic, how long a request waits for others to fill its
            batch; by default a second with static, and not at all with dynamic.
        lora_modules: adapters that are served from the start, each NAME=PATH: a directory in PEFT's layout,
            or a repository on a hub. A path alone is called default-lora, as ms-swift does.
        allow_runtime_lora: whether adapters may be loaded and unloaded while the service runs.
        step_timeout: seconds after which a worker that has not finished a step counts as hung and is killed;
            five times as many for its first steps.
        request_history: of how many requests that ended GET /v1/requests/{id} can tell; 0 is of none, nor of
            those that are open.
        kv_events_config: JSON that says where events of the prefix cache are published over ZMQ, as vLLM has
            it, such as {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}. Needs
            pagewire[kv-events].
        data_parallel_rank: the replica's number, which KV events carry.
        log_format: how logs are written: text, or json, an object a line with the ids of request and trace.
        otlp_traces_endpoint: where spans of traced requests are sent by OTLP: http://HOST:4317 by gRPC,
            http://HOST:4318/v1/traces by HTTP. Default nowhere; nothing is traced then. Needs pagewire[otel].
    """

    listen: tuple[str, ...]
    worker_socket: Path
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    target_itl_ms: float | None = None
    batching_strategy: str = INFLIGHT
    max_queue_delay_microseconds: int | None = None
    lora_modules: tuple[str, ...] = ()
    allow_runtime_lora: bool = False
    step_timeout: float = 120.0
    request_history: int = 1000
    kv_events_config: str | None = None
    data_parallel_rank: int = 0
    log_format: str = "text"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of its range."""
        require(len(self.listen) > 0, "listen", self.listen, "at least one address")
        require_positive(self, "max_num_seqs", "max_num_batched_tokens", "max_num_waiting")
        target = self.target_itl_ms
        require(target is None or 0 < target < float("inf"), "target_itl_ms", target, "more than 0")
        strategy, delay = self.core().batching_strategy, self.max_queue_delay_microseconds
        allowed = "at least 0"
        if strategy not in _BATCH_DELAYS:
            allowed = f"0 or left out with batching_strategy {strategy}, where no request waits for others"
        require(
            not delay or (delay > 0 and strategy in _BATCH_DELAYS),
            "max_queue_delay_microseconds",
            delay,
            allowed,
        )
        timeout = self.step_timeout
        require(0 < timeout < float("inf"), "step_timeout", timeout, "more than 0")
        names = [module_of(each)[0] for each in self.lora_modules]
        require(len(set(names)) == len(names), "lora_modules", names, "names that differ")
        for each in self.lora_modules:
            require(all(module_of(each)), "lora_modules", each, "NAME=PATH")
        require(self.request_history >= 0, "request_history", self.request_history, "at least 0")
        require(self.data_parallel_rank >= 0, "data_parallel_rank", self.data_parallel_rank, "at least 0")
        self.kv_events()
        check_observed(self)

    def core(self) -> CoreSettings:
        """The settings of the scheduler core."""
        return CoreSettings(
            max_num_waiting=self.max_num_waiting,
            enable_prefix_caching=self.enable_prefix_caching,
            target_itl=None if self.target_itl_ms is None else self.target_itl_ms / 1e3,
            batching_strategy=self.batching_strategy,
        )

    def kv_events(self) -> KvEventsConfig:
        """Where KV events are published.

        Raises:
            ConfigError: `kv_events_config` is wrong.
        """
        text = self.kv_events_config
        return KvEventsConfig() if text is None else KvEventsConfig.parse(text)

    @property
    def batch_delay(self) -> float | None:
        """Seconds that a request waits for others to fill its batch; None where requests never do."""
        default = _BATCH_DELAYS.get(self.batching_strategy)
        delay = self.max_queue_delay_microseconds
        return default if default is None or delay is None else delay * 1e-6

    def tls(self) -> ServerTls | None:
        """TLS settings for connections over TCP; None for plain connections.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        return ServerTls.of(self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)


def module_of(text: str) -> tuple[str, str]:
    """(name, path) of an adapter as the command line has it: NAME=PATH, or a path alone."""
    name, equals, path = text.partition("=")
    return (name.strip(), path.strip()) if equals else (DEFAULT_NAME, text.strip())
