"""The batching strategies side by side: one load on a service for each, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.table import Table

from pagewire.bench.picture import Axis, Panel, Series, draw
from pagewire.bench.serve.generator import Generator
from pagewire.bench.serve.sweep import Sweep
from pagewire.bench.serve.target import Target

Start = Callable[[str], AbstractContextManager[Target]]
"""Starts a service with a strategy, and stops it at the end."""

_MEASURES = ("e2e", "ttft", "itl")
_PERCENTILES = ("p50", "p99")


def measure_strategies(
    strategies: Sequence[str], start: Start, sweep: Sweep
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Puts the load on a service of each strategy, one after another, and yields (strategy, figures) as soon
    as they are there. The lengths of the requests and the times at which they come are the same for all.

    Args:
        strategies: in the order in which they are measured.
        start: starts the service.
        sweep: the load, which is one point.

    Raises:
        PagewireError: a service cannot be started, or answers no request of the warm-up.
    """
    for strategy in strategies:
        results: list[dict[str, Any]] = []
        with start(strategy) as target, Generator(target) as generator:
            interrupted = sweep.run(generator, results.append)
        yield from ((strategy, result) for result in results)
        if interrupted:
            return


def strategies_table(results: Mapping[str, dict[str, Any]]) -> Table:
    """A row for each strategy: throughput, and latencies in milliseconds."""
    table = Table(box=None, pad_edge=False)
    latencies = [f"{measure.upper()} {which}" for measure in _MEASURES for which in _PERCENTILES]
    for index, column in enumerate(("STRATEGY", "OUT TOK/S", "REQ/S", *latencies, "FAILED")):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for strategy, result in results.items():
        values = [
            f"{result[f'{measure}_ms'][which]:,.1f}" if result[f"{measure}_ms"] else ""
            for measure in _MEASURES
            for which in _PERCENTILES
        ]
        throughput = f"{result['output_tokens_per_s']:,.0f}", f"{result['requests_per_s']:,.2f}"
        table.add_row(strategy, *throughput, *values, f"{result['requests']['failed']:,}")
    return table


def picture(results: Mapping[str, dict[str, Any]], title: str) -> str:
    """An SVG with bars for each strategy: throughput, the time of a request, and that to its first token.
    Strategies under which no request was complete are left out.
    """
    shown = {name: result for name, result in results.items() if result["e2e_ms"] and result["ttft_ms"]}
    throughput = [result["output_tokens_per_s"] for result in shown.values()]
    panels = [_panel("output tokens/s", list(shown), {"": throughput})]
    for measure, label in (("e2e_ms", "time of a request, ms"), ("ttft_ms", "time to first token, ms")):
        lines = {which: [result[measure][which] for result in shown.values()] for which in _PERCENTILES}
        panels.append(_panel(label, list(shown), lines))
    return draw(title, panels)


def _panel(title: str, names: Sequence[str], values: Mapping[str, Sequence[float]]) -> Panel:
    series = [Series(name, list(enumerate(heights))) for name, heights in values.items()]
    highest = Axis.from_zero([height for heights in values.values() for height in heights])
    return Panel(title, "", Axis(-0.5, max(len(names), 1) - 0.5), highest, series, width=300, bars=names)
