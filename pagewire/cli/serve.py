"""pagewire serve: the whole service on one machine."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import WorkerConfig
from frontend.config import FrontendConfig
from pagewire import __version__
from pagewire.base.notify import notify_ready
from pagewire.base.options import examples, with_options
from pagewire.cli.arguments import File, Hub, Model, Revision
from pagewire.cli.service import WIRING, RunningService, ServiceConfig, http_url, running_service
from pagewire.hub.names.aliases import DEFAULT_MODEL
from pagewire.hub.names.reference import located
from scheduler.config import SchedulerConfig

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = examples(
    "pagewire serve                                             # the default model on ports 8000 and 50051",
    "pagewire serve Qwen/Qwen3-0.6B --port 9000 --grpc-port 0   # another, fetched if need be",
    "pagewire serve ./model.Q4_K_M.gguf --host 127.0.0.1        # a file, for this machine alone",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    options = with_options(FrontendConfig, WorkerConfig, SchedulerConfig, without=WIRING)
    app.command("serve", epilog=EXAMPLES)(options(serve))


def serve(
    model: Model = DEFAULT_MODEL,
    frontends: Annotated[
        int,
        typer.Option(help="Frontend processes; 0 needs --scheduler-listen."),
    ] = 1,
    scheduler_listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where schedulers also take frontends of other hosts, by TLS with --ssl-certfile; replica 1 "
            "at the next port, and so on.",
        ),
    ] = "",
    data_parallel_size: Annotated[
        int,
        typer.Option(
            "--data-parallel-size", "-dp", help="Replicas of the model, each with its own scheduler."
        ),
    ] = 1,
    hub: Hub = None,
    revision: Revision = None,
    file: File = None,
    **values: Any,
) -> None:
    """Serve a model: frontends, scheduler and engine-worker, supervised, until Ctrl-C."""
    place = located(model, hub=hub, revision=revision, file=file)
    config = ServiceConfig.resolve(
        place,
        values,
        frontends=frontends,
        data_parallel_size=data_parallel_size,
        scheduler_listen=scheduler_listen,
    )
    raise typer.Exit(asyncio.run(_serve(config)))


async def _serve(config: ServiceConfig) -> int:
    from rich.console import Console

    from pagewire.cli.report import ConsoleReport, JsonReport

    console = Console(highlight=False)
    width = max(len(spec.name) for stage in config.stages() for spec in stage)
    is_json = config.frontend.log_format == "json"
    report = JsonReport() if is_json else ConsoleReport(console, width)
    report.say(f"pagewire {__version__} serves {config.frontend.served_model_names[0]}")
    started, scheduler_listen = time.monotonic(), config.scheduler_listen
    async with running_service(config, report) as service:

        async def announce() -> None:
            await service.until_serving()
            seconds = time.monotonic() - started
            if not config.frontends:
                notify_ready(f"serving {service.model}")
                listening = [each for replica in config.replicas for each in replica.listen(scheduler_listen)]
                report.say(f"ready after {seconds:.1f} s: schedulers at {', '.join(listening)}")
            elif is_json:
                notify_ready(f"serving {service.model}")
                addresses = f"{http_url(service.config.frontend)}/v1, gRPC {service.grpc_address}"
                report.say(f"ready after {seconds:.1f} s: {addresses}")
            else:
                _announce(console, service, seconds)

        await service.supervisor.serve(announce)
    report.say("killed" if service.supervisor.killed else "stopped")
    return 1 if service.supervisor.killed else 0


def _announce(console: Console, service: RunningService, seconds: float) -> None:
    """Says where the service answers and how to ask it something."""
    notify_ready(f"serving {service.model}")
    message = {"role": "user", "content": "Name the capital of France."}
    body = {"model": service.model, "messages": [message], "max_tokens": 64, "temperature": 0}
    keys = service.config.frontend.api_keys or service.config.frontend.api_key_file
    key = '\n    -H "Authorization: Bearer $PAGEWIRE_API_KEY" \\' if keys else ""
    url = f"{http_url(service.config.frontend)}/v1"
    lines = f"""
ready after {seconds:.1f} s; Ctrl-C stops it
  HTTP  {url}
  gRPC  {service.grpc_address}

try:
  curl {url}/chat/completions -H 'Content-Type: application/json' \\{key}
    -d '{json.dumps(body)}'
"""
    console.print(lines, soft_wrap=True, markup=False)
