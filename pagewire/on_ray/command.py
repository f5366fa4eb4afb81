"""pagewire ray: a service on a Ray cluster."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from engine.config import WorkerConfig
from frontend.config import FrontendConfig
from pagewire.base.errors import ConfigError
from pagewire.base.options import examples, with_options
from pagewire.cli.arguments import File, Hub, Model, Revision
from pagewire.cli.service import WIRING
from pagewire.cli.tables import print_table
from pagewire.hub.names.aliases import DEFAULT_MODEL
from pagewire.hub.names.reference import located
from scheduler.config import SchedulerConfig

EXAMPLES = examples(
    "pagewire ray up Qwen/Qwen3-32B -tp 2 -dp 4     # on the cluster of this machine, or $RAY_ADDRESS",
    "pagewire ray status",
    "pagewire ray down",
)
Address = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", show_envvar=True, help="The cluster's address; auto is the one here."),
]
Name = Annotated[str, typer.Option(help="The service's name on the cluster.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    commands = typer.Typer(
        help="Run a service on a Ray cluster (pagewire[ray]).",
        no_args_is_help=True,
        epilog=EXAMPLES,
        rich_markup_mode=None,
    )
    options = with_options(FrontendConfig, WorkerConfig, SchedulerConfig, without=WIRING)
    commands.command("up", epilog=EXAMPLES)(options(up))
    commands.command("status", epilog=examples("pagewire ray status"))(status)
    commands.command("down", epilog=examples("pagewire ray down --name pagewire"))(down)
    app.add_typer(commands, name="ray")


def up(
    model: Model = DEFAULT_MODEL,
    address: Address = "auto",
    name: Name = "pagewire",
    data_parallel_size: Annotated[
        int, typer.Option("--data-parallel-size", "-dp", help="Replicas of the model.")
    ] = 1,
    frontends: Annotated[int, typer.Option(help="Frontend processes, spread over the nodes.")] = 1,
    cpus_per_rank: Annotated[
        float, typer.Option(min=0, help="Processors that Ray reserves for each rank.")
    ] = 1.0,
    timeout: Annotated[float, typer.Option(help="Seconds until the service must be ready.")] = 600.0,
    hub: Hub = None,
    revision: Revision = None,
    file: File = None,
    **values: Any,
) -> None:
    """Start a service on a Ray cluster: an actor for each scheduler, rank and frontend."""
    _require_ray()
    from pagewire.on_ray import cluster
    from pagewire.on_ray.plan import RayService

    service = RayService.resolve(
        located(model, hub=hub, revision=revision, file=file),
        values,
        name=name,
        data_parallel_size=data_parallel_size,
        frontends=frontends,
        cpus_per_rank=cpus_per_rank,
    )
    cluster.connect(address)
    for each in cluster.up(service, timeout):
        typer.echo(f"HTTP http://{each}/v1")


def status(address: Address = "auto", name: Name = "pagewire") -> None:
    """Say how each process of a service on a Ray cluster is."""
    _require_ray()
    from pagewire.on_ray import cluster

    cluster.connect(address)
    rows = [
        (
            each,
            said["node"],
            str(said["pid"] or "-"),
            "ready" if said["ready"] else said["error"] or "starting",
        )
        for each, said in cluster.status(name).items()
    ]
    print_table(("ACTOR", "NODE", "PID", "STATE"), *rows)


def down(address: Address = "auto", name: Name = "pagewire") -> None:
    """Stop a service on a Ray cluster; frontends drain first."""
    _require_ray()
    from pagewire.on_ray import cluster

    cluster.connect(address)
    typer.echo(f"{cluster.down(name)} processes were stopped")


def _require_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError("this needs Ray; install it with: pip install 'pagewire[ray]'")
