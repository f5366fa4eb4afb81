"""pagewire pull and pagewire models: the cache of models."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command()(pull)
    app.command()(models)


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An alias or a Hugging Face id (owner/name).")],
) -> None:
    """Fetch a model into the cache and print where it lies."""
    from pagewire.hub import pull

    print(pull(name))


def models() -> None:
    """List the models in the cache, and the aliases that can be fetched."""
    from rich.console import Console
    from rich.table import Table

    from pagewire.hub import ALIASES, list_models

    rows = {entry.name: (f"{entry.size / 1e6:,.0f} MB", entry.source) for entry in list_models()}
    for alias in ALIASES.values():
        to_fetch = f"{alias.download_bytes / 1e6:,.0f} MB to fetch"
        rows.setdefault(alias.name, (to_fetch, f"{alias.source}: {alias.description}"))
    table = Table("MODEL", "SIZE", "SOURCE", box=None, pad_edge=False)
    for name, (size, source) in rows.items():
        table.add_row(name, size, source)
    Console(soft_wrap=True, highlight=False).print(table)
