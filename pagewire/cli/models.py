"""pagewire pull and pagewire models: the cache of models."""

from __future__ import annotations

from typing import Annotated

import typer

from pagewire.cli.arguments import File, Hub, Revision
from pagewire.cli.tables import print_table


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command()(pull)
    app.command()(models)


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="An alias, or a model on a hub: owner/name, and of its GGUF files owner/name:Q4_K_M.",
        ),
    ],
    hub: Hub = None,
    revision: Revision = None,
    file: File = None,
) -> None:
    """Fetch a model into the cache and print where it lies. What was fetched before is not fetched again,
    parts of files included."""
    from pagewire.hub import located, pull

    print(pull(located(name, hub=hub, revision=revision, file=file)))


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
