"""pagewire drain: takes frontends out of service, and says when nobody is being answered any more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from pagewire.base.errors import ConfigError, from_code
from pagewire.base.options import examples
from pagewire.cli.registry import ServiceRecord, running_services

EXAMPLES = examples(
    "pagewire drain              # the service that runs here",
    "pagewire drain --pid 4711   # one of several; 'pagewire ps' lists them",
    "pagewire drain --replica 1            # one replica of several; then restart it, and",
    "pagewire drain --replica 1 --resume   # give it requests again",
    "pagewire drain --socket /run/pagewire/frontend.sock --timeout 30",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("drain", epilog=EXAMPLES)(drain)


def drain(
    socket: Annotated[
        list[Path] | None,
        typer.Option(help="A frontend's --admin-socket. Default: those of the service that runs here."),
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(help="The service with this process id; needed where this user runs several here."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every service that this user runs here.")] = False,
    replica: Annotated[
        str | None,
        typer.Option(help="Only this replica (0, 1, ... or the scheduler's address), of each frontend."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Give the replica requests again.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that open requests get. Default: the --drain-timeout."),
    ] = None,
) -> None:
    """Take frontends out of service: no new requests, and open ones finish.

    Ends with status 0 when none is open any more, 1 if some had to be ended. The processes stay until
    SIGTERM. With --replica the frontends go on, with the other replicas: what is open when the time is over
    goes on there, and nothing is ended.
    """
    if resume and replica is None:
        raise ConfigError("--resume needs --replica; a frontend that was drained stays so")
    if sum((bool(socket), pid is not None, every)) > 1:
        raise ConfigError("--socket, --pid and --all exclude each other")
    sockets = socket or _sockets(_chosen(pid, every=every))
    for path in sockets:
        if not path.is_socket():
            raise ConfigError(
                f"{path} is no socket; --socket takes the --admin-socket of a frontend that runs, and "
                "without it the service is drained that 'pagewire ps' lists"
            )
    if resume:
        asyncio.run(_resume_all(sockets, replica or ""))
        typer.echo(f"replica {replica} gets requests again")
        return
    num_aborted = asyncio.run(_drain_all(sockets, timeout, replica or ""))
    if replica is not None:
        typer.echo(f"replica {replica} is drained; {num_aborted} requests went on at others")
        return
    typer.echo(f"drained; {num_aborted} requests were ended" if num_aborted else "drained")
    raise typer.Exit(1 if num_aborted else 0)


def _chosen(pid: int | None, *, every: bool) -> list[ServiceRecord]:
    """The services to drain.

    Raises:
        ConfigError: none runs, none has the process id, or there are several to choose from.
    """
    services = running_services()
    if not services:
        raise ConfigError(
            "no service of this user runs here; 'pagewire serve' starts one, and --socket names "
            "the --admin-socket of a frontend that was started by itself"
        )
    chosen = services if pid is None else [each for each in services if each.pid == pid]
    if len(chosen) == 1 or every:
        return chosen
    listed = ", ".join(f"{each.pid} ({each.model} at {each.http})" for each in services)
    if not chosen:
        raise ConfigError(f"no service of this user has the process id {pid}; there is {listed}")
    raise ConfigError(f"several services run here: {listed}; name one with --pid, or drain --all of them")


def _sockets(services: list[ServiceRecord]) -> list[Path]:
    """The admin sockets of services."""
    directories = [Path(service.directory) for service in services]
    return [path for directory in directories for path in sorted(directory.glob("frontend*.sock"))]


async def _drain_all(sockets: list[Path], timeout: float | None, replica: str) -> int:
    counts = await asyncio.gather(*(_drain(path, timeout, replica) for path in sockets))
    return sum(counts)


async def _resume_all(sockets: list[Path], replica: str) -> None:
    import grpc

    from pagewire.admin.v1 import admin_pb2, admin_pb2_grpc

    for path in sockets:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.Resume(admin_pb2.ResumeRequest(replica=replica))
            except grpc.aio.AioRpcError as error:
                raise from_code(error.code().value[0], f"{path}: {error.details()}") from error


async def _drain(path: Path, timeout: float | None, replica: str) -> int:
    """Drains one frontend, or a replica for it; returns how many requests had to be ended, or moved."""
    import grpc

    from pagewire.admin.v1 import admin_pb2, admin_pb2_grpc

    num_aborted = 0
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            async for progress in stub.Drain(admin_pb2.DrainRequest(timeout=timeout, replica=replica)):
                if not progress.drained:
                    typer.echo(f"{path.stem}: {progress.num_open_requests} requests are open")
                num_aborted = progress.num_aborted
        except grpc.aio.AioRpcError as error:
            message = f"{path}: {error.details()}"
            raise from_code(error.code().value[0], message) from error
    return num_aborted
