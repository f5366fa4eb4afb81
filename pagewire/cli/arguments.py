"""Arguments and options that several commands share and no configuration class defines."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import WorkerConfig
from pagewire.base.command_line import arguments
from pagewire.base.errors import ConfigError, NotFound, Unavailable, Unsupported
from pagewire.base.options import build, with_options
from pagewire.cli.completion import complete_hub, complete_model
from pagewire.cli.service import ServiceConfig
from pagewire.hub.names.aliases import DEFAULT_MODEL
from pagewire.wire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagewire.client import Client

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in Hugging Face layout, a .gguf file, a model on a hub (owner/name) or an alias.",
        autocompletion=complete_model,
    ),
]
Hub = Annotated[
    str | None,
    typer.Option(
        metavar="HUB",
        help="Where the model is: huggingface (the default), or modelscope. Also $PAGEWIRE_HUB.",
        autocompletion=complete_hub,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="The branch, tag or commit of a model on a hub; also owner/name@REVISION.")
]
File = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which GGUF file of a repository: its name, or its quantization (Q4_K_M); also owner/name:NAME.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="gRPC address of a running server; without it one is started."),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="PAGEWIRE_API_KEY", help="Key for the server at --url.", show_envvar=True)
]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy.")]
TopP = Annotated[
    float | None, typer.Option(help="Keeps the likeliest tokens that together have this probability.")
]
TopK = Annotated[int | None, typer.Option(help="Keeps this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]

# A command's own server answers nobody else, so nothing needs to drain.
OWN_SERVER: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "grpc_port": 0, "drain_timeout": 1.0}
# Engine options that make sense for a server of one user.
with_engine_options = with_options(
    WorkerConfig,
    without=(
        "socket",
        "rank",
        "max_num_seqs",
        "block_size",
        "num_blocks",
        "gpu_memory_utilization",
        "seed",
    ),
)


def sampling_params(**values: Any) -> dict[str, Any]:
    """The parameters given on the command line, by SamplingParams field.

    Raises:
        ConfigError: one is out of its range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return given


@contextmanager
def connected(
    model: str, url: str | None, api_key: str | None, values: dict[str, Any]
) -> Iterator[tuple[Client, str]]:
    """A client and the model's name for it: of the server at `url`, or of one started here and stopped at
    the end.

    Raises:
        PagewireError: the server cannot be started, engine options were given for one at `url`, nothing
            answers there, or it serves other models.
    """
    from pagewire.client import Client

    if url is not None:
        refuse_engine_options(values)
        if not url.strip():
            raise ConfigError("--url is empty; give a server's gRPC address, such as localhost:50051")
        with Client(url, api_key, max_retries=0) as client:  # a person sees the error
            yield client, _served_name(client, model, url)
        return

    from pagewire.cli.background import background_service

    config = ServiceConfig.resolve(model, {**values, **OWN_SERVER})
    print(f"starting {model} ...", file=sys.stderr, flush=True)
    with background_service(config) as service, Client(service.grpc_address, max_retries=0) as client:
        yield client, service.model


def _served_name(client: Client, model: str, url: str) -> str:
    """The model's name at a server. Where none was asked for and it does not serve the default one, its own.

    Raises:
        Unavailable: nothing answers.
        NotFound: it has no such model.
    """
    try:
        names = [each.id for each in client.models()]
    except Unsupported:
        return model  # a server of the same protocol that does not list its models
    except Unavailable as error:
        raise Unavailable(
            f"no server answers at {url} ({_why(error.message)}). 'pagewire ps' lists those that run here, "
            f"'pagewire serve {model}' starts one; without --url this command starts its own"
        ) from error
    if model in names or not names:
        return model
    if model == DEFAULT_MODEL:
        print(f"talking to {names[0]}", file=sys.stderr)
        return names[0]
    close = difflib.get_close_matches(model, names, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise NotFound(f"{url} does not serve '{model}'{hint}; it serves {', '.join(names)}")


def _why(message: str) -> str:
    """The last part of gRPC's message, which says what the system said."""
    return message.rpartition("last error: ")[2].rpartition("remote host: ")[2]


def refuse_engine_options(values: dict[str, Any]) -> None:
    """Refuses options of an engine where none is started.

    Raises:
        ConfigError: one was given.
    """
    plain = WorkerConfig(model="", socket=Path())
    given = build(WorkerConfig, {**values, "model": "", "socket": Path()})
    if given != plain:
        raise ConfigError(
            f"{' '.join(arguments(given)[3:])} concerns a server started here; the one at --url has its own"
        )
