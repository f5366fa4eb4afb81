"""The processes of one service on one machine: their configurations, command lines and addresses."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.config import WorkerConfig
from frontend.config import FrontendConfig
from pagewire.base.command_line import arguments, environment
from pagewire.base.errors import ConfigError
from pagewire.base.options import build
from pagewire.base.own_packages import python_command, python_path
from pagewire.base.version import __version__
from pagewire.cli.ports import ReservedPort
from pagewire.cli.registry import PREFIX, RecordingReport, ServiceRecord, runtime_parent
from pagewire.cli.replicas import Replica, check_data_parallel_size, replicas
from pagewire.hub.names.model_name import default_model_name
from pagewire.supervisor import ProcessSpec, Report, Supervisor, ranks_of
from scheduler.config import SchedulerConfig, module_of

# What the service decides by itself, so that `pagewire serve` has no option for it.
WIRING = (
    *("socket", "listen", "worker_socket", "scheduler", "admin_socket", "reuse_port", "rank"),
    *("data_parallel_rank", "scheduler_ssl_ca_certs", "scheduler_ssl_certfile", "scheduler_ssl_keyfile"),
)
# Longest path of a Unix socket, its closing NUL included (sockaddr_un).
MAX_SOCKET_PATH = 108
# Seconds a frontend gets, beyond its own drain timeout, before it is killed.
STOP_MARGIN = 5.0
RECONNECT_SECONDS = 0.2
# Frontends and schedulers multiply no matrices: without threads for it numpy is imported in half the time.
_NO_BLAS_THREADS = MappingProxyType({"OPENBLAS_NUM_THREADS": "1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """One service: `data_parallel_size` replicas, each a scheduler and its worker, and `frontends` frontends
    that share their ports.

    `model` in worker and frontend is a directory, resolved already. Socket paths are relative to the
    runtime directory, which exists only while the service runs.
    """

    worker: WorkerConfig
    scheduler: SchedulerConfig
    frontend: FrontendConfig
    frontends: int
    data_parallel_size: int = 1
    scheduler_listen: str = ""

    @classmethod
    def resolve(
        cls,
        model: str,
        values: dict[str, Any],
        *,
        frontends: int = 1,
        data_parallel_size: int = 1,
        scheduler_listen: str = "",
    ) -> ServiceConfig:
        """From option values; fetches the model, with progress on stderr, if it is not there yet.

        Raises:
            ConfigError: an option or the model is wrong.
        """
        if frontends < (0 if scheduler_listen else 1):
            raise ConfigError(
                f"frontends is {frontends}; it must be at least 1, or 0 with scheduler_listen",
                param="frontends",
            )
        check_data_parallel_size(data_parallel_size)
        replicas(1)[0].listen(scheduler_listen)
        names = values.get("served_model_names") or (default_model_name(model),)
        values = {**values, "model": model, "served_model_names": names}
        if not frontends:
            values |= {"port": 0, "grpc_port": 0}  # others may have these
        socket, scheduler_address = Path("worker.sock"), "unix:scheduler.sock"
        worker = build(WorkerConfig, {**values, "socket": socket})
        scheduler = build(
            SchedulerConfig, {**values, "listen": (scheduler_address,), "worker_socket": socket}
        )
        frontend = build(FrontendConfig, {**values, "scheduler": scheduler_address})
        _check_adapters(worker, scheduler, frontend)
        frontend.tls()  # its files are looked at before anything is started

        from engine.cpu.kernels.build import build_ahead
        from pagewire.hub import ALIASES, resolve_checkpoint

        if worker.engine == "model" and model in ALIASES:  # beside a download; the worker does it for others
            build_ahead(worker.device, worker.dtype)
        directory, load_format = resolve_checkpoint(model, worker.load_format, progress=True)
        return cls(
            worker=replace(worker, model=str(directory), load_format=load_format),
            scheduler=scheduler,
            frontend=replace(frontend, model=str(directory)),
            frontends=frontends,
            data_parallel_size=data_parallel_size,
            scheduler_listen=scheduler_listen,
        )

    def placed(self, runtime_dir: Path, port: int, grpc_port: int) -> ServiceConfig:
        """The same with its sockets in `runtime_dir` and its ports decided.

        Raises:
            ConfigError: the directory's path is too long for Unix sockets.
        """
        if len(str(runtime_dir / "frontend-999.999.notify")) >= MAX_SOCKET_PATH:
            raise ConfigError(
                f"the runtime directory {runtime_dir} has too long a path for Unix sockets (at most "
                f"{MAX_SOCKET_PATH} bytes); set XDG_RUNTIME_DIR to a shorter one"
            )
        return replace(
            self,
            worker=replace(self.worker, socket=runtime_dir / "worker.sock"),
            frontend=replace(
                self.frontend,
                scheduler=",".join(
                    f"unix:{runtime_dir / replica.scheduler_socket}" for replica in self.replicas
                ),
                port=port,
                grpc_port=grpc_port,
                reuse_port=True,
            ),
        )

    @property
    def replicas(self) -> list[Replica]:
        """The replicas' names."""
        return replicas(self.data_parallel_size)

    def stages(self) -> list[list[ProcessSpec]]:
        """The processes in the order in which they stop."""
        frontends = [self._frontend(index) for index in range(self.frontends)]
        return [
            frontends,
            [self._scheduler(replica) for replica in self.replicas],
            [process for replica in self.replicas for process in self._workers(replica)],
        ]

    def _scheduler(self, replica: Replica) -> ProcessSpec:
        directory = self.worker.socket.parent
        config = replace(
            self.scheduler,
            listen=(f"unix:{directory / replica.scheduler_socket}", *replica.listen(self.scheduler_listen)),
            worker_socket=directory / replica.worker_socket,
            data_parallel_rank=replica.number,
        )
        return _process(replica.name("scheduler"), "scheduler", config, more=_NO_BLAS_THREADS)

    def _workers(self, replica: Replica) -> list[ProcessSpec]:
        """The workers that share one replica's model."""
        config = replace(self.worker, socket=self.worker.socket.with_name(replica.worker_socket))
        more = replica.environment(config.device, config.world_size)
        ranks = ranks_of(config, replica.name("engine-worker"))
        return [_process(name, "engine", rank, more=more) for name, rank in ranks.items()]

    def _frontend(self, index: int, generation: int = 0) -> ProcessSpec:
        """A frontend, or the one that is to take its place, whose sockets have names of their own."""
        name = f"frontend-{index}" if self.frontends > 1 else "frontend"
        if generation:
            name = f"{name}.{generation}"
        socket = self.worker.socket.with_name(f"{name}.sock")
        return _process(
            name,
            "frontend",
            replace(self.frontend, admin_socket=socket),
            stop_timeout=self.frontend.drain_timeout + STOP_MARGIN,
            leave_timeout=self.frontend.leave_timeout + STOP_MARGIN,
            successor=lambda: self._frontend(index, generation + 1),
            more=_NO_BLAS_THREADS,
        )


def _check_adapters(worker: WorkerConfig, scheduler: SchedulerConfig, frontend: FrontendConfig) -> None:
    """Looks at the adapters that are served from the start, before anything is; fetches those on hubs.

    Raises:
        ConfigError: one is missing, or named like the model, or adapters are not enabled.
    """
    from pagewire.hub.adapters import resolve_adapter, weights_file

    if (scheduler.lora_modules or scheduler.allow_runtime_lora) and not worker.enable_lora:
        raise ConfigError("adapters are served with --enable-lora only", param="enable_lora")
    for name, path in map(module_of, scheduler.lora_modules):
        if name in frontend.served_model_names:
            raise ConfigError(f"lora_modules names {name!r}, as the model is called", param="lora_modules")
        weights_file(resolve_adapter(path, progress=True))


@dataclass(frozen=True, slots=True)
class RunningService:
    """A started service: its supervisor and where it answers."""

    supervisor: Supervisor
    config: ServiceConfig

    @property
    def http_address(self) -> str:
        """host:port of the HTTP API, as seen from this machine."""
        return http_address(self.config.frontend)

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC API, as seen from this machine."""
        return grpc_address(self.config.frontend)

    @property
    def model(self) -> str:
        """The name that requests use."""
        return self.config.frontend.served_model_names[0]

    async def until_serving(self) -> None:
        """Returns when a request would be served: every process is ready and a frontend has reached the
        engine through the scheduler.

        Raises:
            ChildFailed: a process cannot be brought up.
        """
        await self.supervisor.until_ready()
        sockets = self.config.worker.socket.parent
        if not self.config.frontends:
            for replica in self.config.replicas:
                await watch_until_serving(f"unix:{sockets / replica.scheduler_socket}")
            return
        await watch_until_serving(f"unix:{sockets / self.supervisor.children[0].spec.name}.sock")


@asynccontextmanager
async def running_service(config: ServiceConfig, report: Report) -> AsyncIterator[RunningService]:
    """Starts the processes and stops them at the end. They are not ready yet: see Supervisor.until_ready.

    Raises:
        ConfigError: a port is in use, or the runtime directory cannot be made.
    """
    frontend = config.frontend
    port = ReservedPort(frontend.host, frontend.port, "port")
    try:
        grpc_port = ReservedPort(frontend.host, frontend.grpc_port, "grpc-port")
        try:
            with _runtime_directory() as runtime_dir:
                placed = config.placed(Path(runtime_dir), port.port, grpc_port.port)
                recording = RecordingReport(_record(placed, runtime_dir), report)
                async with Supervisor(placed.stages(), Path(runtime_dir), recording) as supervisor:
                    yield RunningService(supervisor, placed)
        finally:
            grpc_port.release()
    finally:
        port.release()


async def watch_until_serving(grpc_address: str) -> None:
    """Watches a server's health (grpc.health.v1) until it says SERVING, which it does unasked."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest()
    while True:
        async with grpc.aio.insecure_channel(grpc_address) as channel:
            try:
                async for answer in health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(RECONNECT_SECONDS)  # that frontend died; its successor will answer


def _runtime_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory for sockets that only this user can enter (mode 0700)."""
    parent = runtime_parent()
    try:
        return tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make a runtime directory in {parent}: {error.strerror}; set XDG_RUNTIME_DIR to a "
            "directory that can be written"
        ) from error


def _process(
    name: str,
    module: str,
    config: Any,
    *,
    more: Mapping[str, str] = MappingProxyType({}),
    **settings: Any,
) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        command=(*python_command(module), *arguments(config)),
        environment={**python_path(), **more, **environment(config)},
        **settings,
    )


def http_address(frontend: FrontendConfig) -> str:
    """host:port of the HTTP API, as seen from this machine."""
    return f"{_reachable(frontend.host)}:{frontend.port}"


def grpc_address(frontend: FrontendConfig) -> str:
    """host:port of the gRPC API, as seen from this machine."""
    return f"{_reachable(frontend.host)}:{frontend.grpc_port}"


def http_url(frontend: FrontendConfig) -> str:
    """The address of the HTTP API with its scheme."""
    return f"{'http' if frontend.ssl_certfile is None else 'https'}://{http_address(frontend)}"


def _record(config: ServiceConfig, directory: str) -> ServiceRecord:
    """What `pagewire ps` is to know of the service, whose ports are decided."""
    return ServiceRecord.of_this_process(
        directory=directory,
        model=config.frontend.served_model_names[0],
        version=__version__,
        http=http_url(config.frontend),
        grpc=grpc_address(config.frontend),
    )


def _reachable(host: str) -> str:
    """An address that a client on this machine can connect to."""
    if host in ("", "0.0.0.0", "::"):  # nosec B104 # binds nothing
        return "localhost"
    return f"[{host}]" if ":" in host else host
