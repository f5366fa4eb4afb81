"""The frontend process: both protocols on one event loop, over one stream to each scheduler."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal

import uvloop

from frontend.access_log import AccessLog
from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.grpc.admin import AdminServer
from frontend.grpc.service import GrpcServer
from frontend.http.server import HttpServer
from frontend.metrics import FrontendMetrics
from frontend.replicas.links import SchedulerLinks
from frontend.request_log import RequestLog
from frontend.served_model import ServedModel
from frontend.tracing import FrontendTracing
from pagewire.base.gc_freeze import spare_what_is_loaded
from pagewire.base.notify import notify_ready
from pagewire.hub import resolve_model
from pagewire.hub.names.model_name import default_model_name
from pagewire.telemetry.spans import span_writer

logger = logging.getLogger(__name__)

_REFUSE_GRACE = 0.25
"""Seconds after the drain in which calls that are on their way still get their refusal: a gRPC server that
is being stopped would answer them CANCELLED."""

_FIRST_NEWS = 0.5
"""Seconds in which a scheduler that is there answers; at a service's start it may not be there yet."""

_LINGER = 1.0
"""Seconds in which a frontend that leaves still answers on idle HTTP connections. Closing one while a request
is on its way would lose that; who has been silent for so long is unlikely to speak at that very moment."""

_LOOK_AGAIN = 0.1

_OTHER_FILES = 200

_FLUSH_GRACE = 1.0
"""Seconds that a gRPC client gets to take the end of its stream, after the drain."""


class Frontend:
    """Everything one frontend process consists of, from first to last.

    Attributes:
        pipeline, link, http, grpc: the parts, once started.
    """

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self.metrics = FrontendMetrics()
        self._spans = span_writer(config.otlp_traces_endpoint, "frontend")
        self._tracing = FrontendTracing(self._spans, config.otlp_traces_sample_ratio)
        self._admin: AdminServer | None = None
        tls = config.tls()
        self._tls = None if tls is None else tls.reloading()
        self.link = SchedulerLinks(
            config.scheduler, reconnect_timeout=config.reconnect_timeout, tls=config.scheduler_tls()
        )
        self.link.on_change(self._show_link)
        self.metrics.before = self._show_replicas

    async def start(self) -> None:
        """Connects to the scheduler and, meanwhile, loads the model's text side; then serves.

        Raises:
            ConfigError: the model cannot be read, or an address cannot be had.
        """
        await self.link.start()
        model = await asyncio.to_thread(load_model, self._config)
        config = self._config
        self.pipeline = GenerationPipeline(
            model,
            self.link,
            self.metrics,
            request_log=RequestLog(enabled=config.enable_log_requests, max_log_len=config.max_log_len),
            max_prompt_tokens=config.max_prompt_tokens,
            constraints=config.constraints(),
            tracing=self._tracing,
        )
        # Who listens and refuses everything, because it has yet to reach a scheduler that is there, takes
        # requests from frontends that would serve them.
        await self.link.heard_within(_FIRST_NEWS)
        access_log = AccessLog(enabled=self._config.access_log)
        parts = (self._config, self.pipeline, self.metrics, access_log, self._tracing, self._tls)
        self.http = HttpServer(*parts)
        self.grpc = GrpcServer(*parts)
        await self.http.start()
        await self.grpc.start()
        self.link.on_change(self.grpc.report_health)
        self.pipeline.on_drain = self.grpc.report_health
        if config.admin_socket is not None:
            self._admin = AdminServer(
                config.admin_socket, self.pipeline, self.grpc.health, config.drain_timeout
            )
            await self._admin.start()

    async def leave(self) -> None:
        """Leaves the ports to other frontends: takes no new connection, and serves those it has until their
        clients have gone to another one, which they are asked to. Nothing is refused."""
        self.pipeline.leaving = True
        self.grpc.report_health()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.leave_timeout - self._config.drain_timeout
        await self.http.stop_listening()
        self.grpc.stop_listening()
        await asyncio.sleep(_LINGER)
        # gRPC says nothing when a connection ends.
        while loop.time() < deadline and (self.http.close_idle() or self.grpc.num_connections()):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN)

    async def stop(self, drain_timeout: float, refuse_grace: float = _REFUSE_GRACE) -> None:
        """Refuses new requests, lets open ones finish for `drain_timeout` seconds, still refuses for
        `refuse_grace` seconds what is on its way, then closes everything."""
        await self.pipeline.drain(drain_timeout)
        await asyncio.sleep(refuse_grace)
        await asyncio.gather(self.grpc.stop(_FLUSH_GRACE), self.http.stop())
        if self._admin is not None:
            await self._admin.stop()
        await self.link.stop()
        self.pipeline.close()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)

    def _show_replicas(self) -> None:
        self.metrics.requests_moved.set(self.link.num_moved)
        for link in self.link.links if self.link.are_several else ():
            self.metrics.show_replica(
                link.name,
                ready=link.takes_requests,
                requests=self.link.num_routed[link.name],
                prefix_tokens=self.link.num_prefix_tokens[link.name],
            )

    def _show_link(self) -> None:
        self.metrics.scheduler_ready.set(self.link.ready)
        self.metrics.scheduler_reconnects.set(self.link.num_reconnects)


def load_model(config: FrontendConfig) -> ServedModel:
    """Finds the model's directory and reads its tokenizer, template and defaults. Slow.

    Raises:
        ConfigError: there is no such model, or a file is wrong.
    """
    directory = resolve_model(config.model)
    names = config.served_model_names or (default_model_name(config.model),)
    return ServedModel.load(
        directory,
        names,
        config.chat(),
        pooling=config.pooling,
        score_template=config.score_template,
        classifier_from_token=config.classifier_from_token,
    )


def _raise_file_limit(config: FrontendConfig) -> None:
    """Every connection is an open file, and the usual limit on these is for programs that have few."""
    needed = 2 * config.max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < needed:
        logger.warning(
            "this process may have %d files open, too few for max_connections=%d on both protocols: raise "
            "the limit (ulimit -n) to %d, or lower --max-connections",
            possible,
            config.max_connections,
            needed,
        )


async def _serve(config: FrontendConfig) -> int:
    _raise_file_limit(config)
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    leaving = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR2, leaving.set)
    frontend = Frontend(config)
    await frontend.start()
    status = f"HTTP on {config.host}:{frontend.http.port}, gRPC on {config.host}:{frontend.grpc.port}"
    logger.info("serving %s: %s", ", ".join(frontend.pipeline.model.names), status)
    spare_what_is_loaded()
    notify_ready(status)
    stopping = asyncio.create_task(signalled.wait())
    handed_over = asyncio.create_task(_leave_when(leaving, frontend))
    await asyncio.wait((stopping, handed_over, frontend.link.failed), return_when=asyncio.FIRST_COMPLETED)
    if frontend.link.failed.done():
        logger.critical("the link to the scheduler broke", exc_info=frontend.link.failed.exception())
        return 1
    logger.info("draining: open requests get up to %g s", config.drain_timeout)
    await frontend.stop(config.drain_timeout)
    return 0


async def _leave_when(leaving: asyncio.Event, frontend: Frontend) -> None:
    await leaving.wait()
    logger.info("leaving: another frontend takes new connections")
    await frontend.leave()


def run(config: FrontendConfig) -> int:
    """Serves until SIGTERM or SIGINT, drains, and returns the process's exit status. On SIGUSR2 it leaves the
    ports to other frontends and ends when its clients have gone there.

    Raises:
        ConfigError: the frontend cannot start as configured.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config))
