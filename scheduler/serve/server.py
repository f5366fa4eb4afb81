"""The scheduler process: its gRPC service and the engine driver on one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.dispatch.ring import remove_orphans
from pagewire.base.errors import ConfigError
from pagewire.base.gc_freeze import spare_what_is_loaded
from pagewire.base.notify import notify_ready
from pagewire.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from pagewire.telemetry.spans import span_writer
from scheduler.config import SchedulerConfig
from scheduler.serve.driver import EngineDriver
from scheduler.serve.kv_events import KvEventCollector, KvEventPublisher
from scheduler.serve.service import SchedulerService

logger = logging.getLogger(__name__)

_SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.http2.max_ping_strikes", 0),  # quiet streams are kept alive by pings
    ("grpc.so_reuseport", 0),
)
_STOP_GRACE = 2.0


class SchedulerServer:
    """Everything one scheduler process consists of."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        tls = config.tls()
        self._tls = None if tls is None else tls.reloading()
        self._spans = span_writer(config.otlp_traces_endpoint, "scheduler")
        self._driver = EngineDriver(config, self._spans)
        self._kv_events = self._publisher()
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        self._tasks: list[asyncio.Task[None]] = []

    def _publisher(self) -> KvEventPublisher | None:
        """Publishes the cache's events, if they are asked for.

        Raises:
            ConfigError: an address cannot be bound.
        """
        config, driver = self._config.kv_events(), self._driver
        if not config.is_on:
            return None
        publisher = KvEventPublisher(config, self._config.data_parallel_rank)
        driver.cache_feed.add_watcher(KvEventCollector(lambda: driver.facts, publisher.publish))
        return publisher

    async def start(self) -> None:
        """Listens, and starts attaching to the worker.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(  # type: ignore[no-untyped-call]
            SchedulerService(self._driver), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        for address in self._config.listen:
            self._listen(address)
        await self._server.start()
        self._tasks = [asyncio.create_task(self._driver.run()), asyncio.create_task(self._report_health())]

    def _listen(self, address: str) -> None:
        previous = os.umask(0o177)
        try:
            if self._add_port(address) == 0:
                raise ConfigError(f"cannot listen on {address}", param="listen")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}", param="listen") from error
        finally:
            os.umask(previous)

    def _add_port(self, address: str) -> int:
        """Binds an address. Unix sockets are accessible to this user only and need no TLS."""
        if not address.startswith("unix:"):
            if self._tls is not None:
                return int(self._server.add_secure_port(address, self._tls.grpc_credentials()))
            logger.warning(
                "%s takes plain connections: whoever reaches it can submit requests; see --ssl-certfile and "
                "--ssl-ca-certs",
                address,
            )
        return int(self._server.add_insecure_port(address))

    async def _report_health(self) -> None:
        """Reports the health status SERVING while an engine is attached."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        while True:
            for service in ("", _SERVICE):
                await self._health.set(service, statuses.NOT_SERVING)
            await self._driver.attached.wait()
            for service in ("", _SERVICE):
                await self._health.set(service, statuses.SERVING)
            await self._driver.detached.wait()

    async def wait(self) -> None:
        """Waits until the driver or the health report fails, and raises its exception."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Closes all streams and detaches from the worker."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_STOP_GRACE)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._kv_events is not None:
            await asyncio.to_thread(self._kv_events.close)
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)


async def _serve(config: SchedulerConfig) -> int:
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    for name in remove_orphans():
        logger.info("removed shared memory %s, left by a process that died", name)
    server = SchedulerServer(config)
    await server.start()
    status = f"gRPC on {', '.join(config.listen)}"
    logger.info("scheduling: %s", status)
    spare_what_is_loaded()
    notify_ready(status)
    stopping = asyncio.create_task(signalled.wait())
    broken = asyncio.create_task(server.wait())
    await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
    error = broken.exception() if broken.done() else None
    broken.cancel()
    await server.stop()
    if isinstance(error, ConfigError):
        raise error
    if error is not None:
        logger.critical("the scheduler broke", exc_info=error)
        return 1
    return 0


def run(config: SchedulerConfig) -> int:
    """Serves until SIGTERM or SIGINT and returns the process's exit status.

    Raises:
        ConfigError: the scheduler cannot start as configured.
    """
    for address in config.listen:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).parent.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config))
