"""pagewire top: what services do, while they do it."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from pagewire.base.errors import ConfigError, PagewireError
from pagewire.base.options import examples
from pagewire.cli.registry import running_services
from pagewire.cli.scrape import Scraper, Snapshot, Window

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = examples(
    "pagewire top                                  # every service of this user here",
    "pagewire top --url http://gpu-3:8000          # one that runs elsewhere",
    "pagewire top --once                           # one table, for a script or a report",
)
BAR_WIDTH = 20
_HISTORY = 40
_SHOWN = 3
_SPARKS = "▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("top", epilog=EXAMPLES)(top)


def top(
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="HTTP address of a service; may be repeated. Default: those that 'pagewire ps' lists.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PAGEWIRE_API_KEY", help="Key for the services.", show_envvar=True)
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Look twice, print one table and leave; so where there is no terminal."),
    ] = False,
) -> None:
    """Watch services: queues, KV blocks, prefix hits, tokens/s, TTFT and ITL, by model. Ctrl-C leaves.

    Rates and latencies are those of the last interval.
    """
    addresses = url or [service.http for service in running_services()]
    if not addresses:
        raise ConfigError(
            "no service of this user runs here; 'pagewire serve MODEL' starts one, --url names one elsewhere"
        )
    services = [Watched(Scraper(each, api_key)) for each in addresses]
    for service in services:
        service.look()
        if service.problem is not None:
            raise service.problem
    time.sleep(interval)

    from rich.console import Console

    console = Console(highlight=False)
    if once or not sys.stdout.isatty():
        console.print(_look_and_draw(services))
        return

    from rich.live import Live

    with Live(_look_and_draw(services), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                live.update(_look_and_draw(services), refresh=True)
        except KeyboardInterrupt:
            return


@dataclass(slots=True)
class Watched:
    """A service that is looked at again and again.

    Attributes:
        title: its model and where it runs; its address until it has said.
        window: between the last two looks that succeeded.
        speeds: tokens generated a second, the latest last.
        problem: why the last look failed.
    """

    scraper: Scraper
    title: str = ""
    window: Window | None = None
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    problem: PagewireError | None = None
    _last: Snapshot | None = None

    def look(self) -> None:
        """Takes another snapshot."""
        try:
            if not self.title:
                self.title = _title(self.scraper)
            new = self.scraper.snapshot()
        except PagewireError as error:
            self.problem = error
            return
        self.problem = None
        if self._last is not None:
            self.window = Window(self._last, new)
            self.speeds.append(self.window.rate("generation_tokens_total"))
        self._last = new


def _title(scraper: Scraper) -> str:
    info = scraper.server_info()
    names = ", ".join(info.get("served_model_names") or ["?"])
    engine = info.get("engine") or {}
    where = f"{engine.get('device')} {engine.get('dtype')}" if engine else "no engine yet"
    kernels = engine.get("kernels")
    return f"{names}\n{where}" + (f" ({kernels})" if kernels else "") + f"\n{scraper.url}"


def _look_and_draw(services: Sequence[Watched]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for service in services:
        service.look()
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(Text(time.strftime("%H:%M:%S")))
    for service in services:
        table.add_column(Text(service.title or service.scraper.url))
    columns = [_figures(service) for service in services]
    for section in SECTIONS:
        for name in section:
            table.add_row(name, *(Text(column.get(name, "-")) for column in columns))
        table.add_section()
    for service in services:
        if service.problem is not None:
            table.caption = f"{service.scraper.url}: {service.problem.message}"
    return table


SECTIONS = (
    ("requests", "clients waiting", "adapters", "ended", "refused", "preempted"),
    ("generated", "lately", "computed", "TTFT", "ITL", "request", "step"),
    ("KV blocks", "cached blocks", "prefix hits", "evicted"),
)


def _figures(service: Watched) -> dict[str, str]:
    """What the table shows of a service, by row."""
    window = service.window
    if window is None or window.now("num_requests_running") is None:
        return {"requests": "its scheduler cannot be reached"} if service.problem is None else {}
    return {**_requests(window), **_speed(window), "lately": _sparks(service.speeds), **_memory(window)}


def _requests(window: Window) -> dict[str, str]:
    return {
        "requests": f"{_count(window, 'num_requests_running')} running, "
        f"{_count(window, 'num_requests_waiting')} waiting",
        "clients waiting": _count(window, "num_clients_waiting"),
        "adapters": _adapters(window.new),
        "ended": f"{window.rate('request_success_total'):,.1f}/s",
        "refused": f"{window.rate('request_refused_total'):,.1f}/s",
        "preempted": f"{window.rate('num_preemptions_total'):,.1f}/s",
    }


def _speed(window: Window) -> dict[str, str]:
    return {
        "generated": f"{window.rate('generation_tokens_total'):,.1f} tokens/s",
        "computed": f"{window.rate('computed_tokens_total'):,.1f} tokens/s, prompts included",
        "TTFT": _latency(window, "time_to_first_token_seconds"),
        "ITL": _latency(window, "inter_token_latency_seconds"),
        "request": _latency(window, "e2e_request_latency_seconds"),
        "step": _latency(window, "step_execute_time_seconds"),
    }


def _memory(window: Window) -> dict[str, str]:
    used, total = window.now("kv_cache_used_blocks") or 0.0, window.now("kv_cache_blocks") or 0.0
    asked, found = window.grown("prefix_cache_queries_total"), window.grown("prefix_cache_hits_total")
    ever, ever_found = window.now("prefix_cache_queries_total"), window.now("prefix_cache_hits_total")
    return {
        "KV blocks": f"{_bar(used, total)} {used:,.0f} of {total:,.0f} used",
        "cached blocks": _count(window, "kv_cache_cached_blocks"),
        "prefix hits": f"{_share(found, asked)} of prompt tokens, {_share(ever_found, ever)} since the start",
        "evicted": f"{window.rate('kv_cache_evictions_total'):,.1f} blocks/s",
    }


def _adapters(snapshot: Snapshot) -> str:
    if snapshot.adapters is None:
        return "-"
    running, waiting = map(_names, snapshot.adapters)
    return f"{running} running, {waiting} waiting"


def _names(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})" if names else "none"


def _count(window: Window, name: str) -> str:
    value = window.now(name)
    return "-" if value is None else f"{value:,.0f}"


def _latency(window: Window, name: str) -> str:
    middle, slow = window.quantile(name, 0.5), window.quantile(name, 0.99)
    return "-" if middle is None or slow is None else f"p50 {_seconds(middle)}, p99 {_seconds(slow)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * (part or 0.0) / whole:.0f} %" if whole else "-"


def _bar(part: float, whole: float) -> str:
    filled = round(BAR_WIDTH * part / whole) if whole else 0
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def _sparks(values: Sequence[float]) -> str:
    """A line of bars, the highest as high as can be."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return ""
    return "".join(_SPARKS[round((len(_SPARKS) - 1) * value / highest)] for value in values)
