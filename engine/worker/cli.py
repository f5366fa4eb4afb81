"""The `engine-worker` command."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import typer

from engine.config import WorkerConfig
from engine.worker.process import run_process, run_worker
from pagewire.base.options import build, examples, with_options

EXAMPLES = examples("engine-worker smollm2-135m --socket /run/pagewire/worker.sock")

app = typer.Typer(
    name="engine-worker", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.command(epilog=EXAMPLES)
@with_options(WorkerConfig)
def engine_worker(**values: Any) -> None:
    """Load a model and compute steps for a scheduler, in the foreground, until SIGTERM."""
    raise typer.Exit(run_worker(build(WorkerConfig, values)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process, with the statuses of `run_process`."""
    run_process(partial(app, args=arguments, prog_name="engine-worker"))
