"""The `pagewire` command: its subcommands, and how errors become exit statuses.

Nothing heavy is imported before a subcommand needs it, so that `pagewire --help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pagewire import __version__
from pagewire.base.errors import ConfigError, PagewireError
from pagewire.base.lifeline import end_with_parent
from pagewire.base.options import examples
from pagewire.cli import batch, bench, chat, drain, generate, infer, models, processes, ps, serve, top, warmup

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
models.register(app)
ps.register(app)
top.register(app)
drain.register(app)
warmup.register(app)
bench.register(app)


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

    Status 0: done. 1: it failed. 2: the command line, a setting or a model is wrong. 130: interrupted.
    """
    try:
        app(prog_name="pagewire")
    except PagewireError as error:
        print(f"pagewire: {error.message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head` does
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise  # it is about no file that the user named
        print(f"pagewire: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except UnicodeError as error:
        print(f"pagewire: an argument or the input is not UTF-8: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
