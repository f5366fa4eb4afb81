"""pagewire frontend, scheduler and engine-worker: each process alone, in the foreground.

For systemd, Kubernetes and the like; `pagewire serve` starts its processes by the same commands.
"""

from __future__ import annotations

from typing import Any

import typer

from frontend.config import FrontendConfig
from pagewire.base.options import build, examples, with_options
from pagewire.telemetry.logs import log_to_stderr
from scheduler.config import SchedulerConfig

FRONTEND_EXAMPLES = examples("pagewire frontend smollm2-135m --scheduler unix:/run/pagewire/scheduler.sock")
SCHEDULER_EXAMPLES = examples(
    "pagewire scheduler --listen unix:/run/pagewire/scheduler.sock --worker-socket /run/pagewire/worker.sock"
)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command("frontend", epilog=FRONTEND_EXAMPLES)(with_options(FrontendConfig)(frontend))
    app.command("scheduler", epilog=SCHEDULER_EXAMPLES)(with_options(SchedulerConfig)(scheduler))
    app.command(
        "engine-worker",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(engine_worker)


def frontend(**values: Any) -> None:
    """Run one frontend: text, HTTP and public gRPC before a scheduler."""
    config = build(FrontendConfig, values)

    from frontend.text.template_renderer import RENDERER

    RENDERER.start()  # it starts while everything else is imported, which takes longer

    from frontend.server import run

    log_to_stderr(config.log_format, "frontend")
    raise typer.Exit(run(config))


def scheduler(**values: Any) -> None:
    """Run one scheduler before an engine-worker."""
    config = build(SchedulerConfig, values)

    from scheduler.serve.server import run

    log_to_stderr(config.log_format, "scheduler")
    raise typer.Exit(run(config))


def engine_worker(context: typer.Context) -> None:
    """Run one engine-worker; the same as the command `engine-worker`."""
    from engine.worker.cli import main

    main(context.args)
