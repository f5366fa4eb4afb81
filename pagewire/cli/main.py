"""The `pagewire` command: its subcommands.

Nothing heavy is imported before a subcommand needs it, so that `pagewire --help` is quick.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from pagewire import __version__
from pagewire.base.lifeline import end_with_parent
from pagewire.base.options import examples
from pagewire.base.run_command import run_command
from pagewire.cli import (
    batch,
    bench,
    chat,
    drain,
    export,
    generate,
    infer,
    lora,
    models,
    processes,
    ps,
    serve,
    top,
    warmup,
)
from pagewire.on_ray import command as ray_command

EXAMPLES = examples(
    "pagewire serve smollm2-135m    # a service; its output says how to ask it",
    "pagewire chat                  # a conversation, with nothing else running",
    "pagewire --install-completion  # Tab completes commands, options and models",
)

app = typer.Typer(
    name="pagewire",
    help="Serves large language models over gRPC and an OpenAI-compatible HTTP API.",
    no_args_is_help=True,
    epilog=EXAMPLES,
    rich_markup_mode=None,  # rich's help cuts long option names at 80 columns
    pretty_exceptions_enable=False,
)
serve.register(app)
processes.register(app)
chat.register(app)
generate.register(app)
infer.register(app)
batch.register(app)
export.register(app)
models.register(app)
lora.register(app)
ps.register(app)
top.register(app)
drain.register(app)
warmup.register(app)
bench.register(app)
ray_command.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pagewire {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    end_with_parent()


def main() -> None:
    """Runs the command line and ends the process.

    Status 0: done. Others: see `run_command`.
    """
    run_command(partial(app, prog_name="pagewire"))


if __name__ == "__main__":
    main()
