"""pagewire lora: adapters of a service that runs, loaded, unloaded and listed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pagewire.base.errors import ConfigError
from pagewire.base.options import examples
from pagewire.cli.registry import running_services
from pagewire.cli.scrape import Scraper
from pagewire.cli.tables import print_table

EXAMPLES = examples(
    "pagewire lora load sql ./adapters/sql              # requests may name 'sql' as their model now",
    "pagewire lora load sql ./adapters/sql-2 --in-place # another takes its place; streams keep the former",
    "pagewire lora load chat owner/adapter-on-a-hub --url http://gpu-3:8000",
    "pagewire lora list",
    "pagewire lora unload sql",
)
# Reading an adapter, or fetching it from a hub, takes a while.
_LOAD_SECONDS = 600.0

Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="HTTP address of the service. Default: the one that runs here."),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="PAGEWIRE_API_KEY", help="Key for the service.", show_envvar=True)
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=["PAGEWIRE_ADMIN_API_KEY", "PAGEWIRE_API_KEY"],
        help="Key for the service: its --admin-api-key, or without one that of requests.",
        show_envvar=True,
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What requests call the adapter.")]

lora = typer.Typer(
    name="lora",
    help="LoRA adapters of a service that runs: load, unload, list.",
    no_args_is_help=True,
    epilog=EXAMPLES,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.add_typer(lora)


@lora.command("load", epilog=EXAMPLES)
def load(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A directory on the server as PEFT or ms-swift writes it, or owner/name on a hub. What is a "
            "directory here is sent as its absolute path.",
        ),
    ],
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Take the place of the adapter that has the name."),
    ] = False,
    url: Url = None,
    api_key: AdminKey = None,
) -> None:
    """Load an adapter. The service needs --enable-lora and --allow-runtime-lora."""
    if Path(path).is_dir():
        path = os.path.abspath(path)
    body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
    _service(url, api_key).post("/v1/load_lora_adapter", body, timeout=_LOAD_SECONDS)
    typer.echo(f"{name} is loaded")


@lora.command("unload", epilog=EXAMPLES)
def unload(name: Name, url: Url = None, api_key: AdminKey = None) -> None:
    """Unload an adapter. Requests that run with it keep it to their end."""
    _service(url, api_key).post("/v1/unload_lora_adapter", {"lora_name": name})
    typer.echo(f"{name} is unloaded")


@lora.command("list", epilog=EXAMPLES)
def list_adapters(url: Url = None, api_key: ApiKey = None) -> None:
    """List the adapters that requests may name."""
    models: list[dict[str, Any]] = _service(url, api_key).get_json("/v1/models")["data"]
    rows = [(each["id"], each["parent"], each["root"]) for each in models if each.get("parent")]
    if not rows:
        typer.echo("no adapters; 'pagewire lora load NAME PATH' loads one", err=True)
        return
    print_table(("NAME", "MODEL", "PATH"), *rows)


def _service(url: str | None, api_key: str | None) -> Scraper:
    """The service that is meant.

    Raises:
        ConfigError: none or several run here and none is named, or the address is none.
    """
    if url is not None:
        return Scraper(url, api_key)
    services = running_services()
    if not services:
        raise ConfigError(
            "no service of this user runs here; 'pagewire serve MODEL --enable-lora' starts one, --url names "
            "one elsewhere"
        )
    if len(services) > 1:
        listed = ", ".join(f"{each.http} ({each.model})" for each in services)
        raise ConfigError(f"several services run here: {listed}; name one with --url")
    return Scraper(services[0].http, api_key)
