"""pagewire ps: the services that run on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated, Any

import typer

from pagewire.base.options import examples
from pagewire.cli.registry import ServiceRecord, resident_bytes, running_services
from pagewire.cli.tables import duration, print_table

EXAMPLES = examples(
    "pagewire ps",
    "pagewire ps --json | jq -r '.[].http'    # where they answer, for scripts",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("ps", epilog=EXAMPLES)(ps)


def ps(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False) -> None:
    """List the services of this user that run here: process ids, models, addresses, memory.

    Those of `pagewire serve`, and those that other commands start for themselves. Processes that were started
    one by one (`pagewire frontend` and so on) belong to whatever started them.
    """
    services = running_services()
    if as_json:
        print(json.dumps([_described(service) for service in services], indent=2))
    elif services:
        print_table(
            ("PID", "MODEL", "STATE", "UPTIME", "MEMORY", "HTTP", "GRPC", "PROCESSES"), *map(_row, services)
        )
    else:
        print("no service of this user runs here; 'pagewire serve' starts one", file=sys.stderr)


def _described(service: ServiceRecord) -> dict[str, Any]:
    processes = [
        {"name": name, **dataclasses.asdict(process), "resident_bytes": resident_bytes(process.pid)}
        for name, process in service.processes.items()
    ]
    return {
        "pid": service.pid,
        "model": service.model,
        "version": service.version,
        "state": service.state,
        "started_at": service.started_at,
        "uptime_seconds": round(time.time() - service.started_at, 3),
        "http": service.http,
        "grpc": service.grpc,
        "processes": processes,
    }


def _row(service: ServiceRecord) -> tuple[str, ...]:
    memory = sum(resident_bytes(process.pid) for process in service.processes.values())
    processes = ", ".join(
        f"{name} {process.pid}" + (f" (restarted {process.restarts} times)" if process.restarts else "")
        for name, process in service.processes.items()
    )
    return (
        str(service.pid),
        service.model,
        service.state,
        duration(time.time() - service.started_at),
        f"{memory / 1e6:,.0f} MB",
        service.http,
        service.grpc,
        processes,
    )
