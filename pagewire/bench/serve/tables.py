"""A run's figures for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_MEASURES = ("ttft", "tpot", "itl", "e2e")
_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def point_lines(result: dict[str, Any]) -> list[str]:
    """What a point's tables leave out: counts, errors, goodput, the client's own health."""
    requests = result["requests"]
    counts = [f"{requests['complete']:,} of {requests['sent']:,} requests complete"]
    counts += [f"{requests[kind]:,} {kind}" for kind in ("failed", "unfinished", "resent") if requests[kind]]
    lines = [
        f"{', '.join(counts)}, in {result['seconds']:,.2f} s; at most {result['most_open']:,} open at once",
        f"{result['input_tokens']:,} tokens in ({result['cached_input_tokens']:,} cached), "
        f"{result['output_tokens']:,} out (counted by: {result['output_tokens_counted_by']})",
        f"{result['requests_per_s']:,.2f} requests/s, {result['output_tokens_per_s']:,.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:,.1f} tokens/s in all",
    ]
    if "goodput" in result:
        goodput = result["goodput"]
        slo = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput["slo_ms"].items())
        lines.append(
            f"goodput {goodput['requests_per_s']:,.2f} requests/s: "
            f"{goodput['share_of_sent']:.1%} within {slo}"
        )
    lines += [f"error, {count:,} times: {error}" for error, count in result["errors"].items()]
    if result["wrong_output_length"]:
        lines.append(
            f"{result['wrong_output_length']:,} outputs are not as long as asked; finish reasons: "
            + ", ".join(f"{reason or 'none'} {count:,}" for reason, count in result["finish_reasons"].items())
        )
    lines += [f"warning: {warning}" for warning in result["client"]["warnings"]]
    client = result["client"]
    if client["cpu_us_per_output"] is not None:
        lines.append(
            f"load generator: {client['cpu_us_per_output']:.1f} µs of CPU a piece of output, "
            f"{client['busiest_cpu_share']:.0%} of a core at most"
            + (f", loop late by {client['loop_lag_ms']['p99']:.1f} ms (p99)" if client["loop_lag_ms"] else "")
        )
    return lines


def latency_table(result: dict[str, Any]) -> Table:
    """One point's latencies: a row for each measure."""
    table = _table("MS", *(name.upper() for name in _COLUMNS))
    for measure in _MEASURES:
        values = result[f"{measure}_ms"]
        if values is not None:
            table.add_row(measure.upper(), *(f"{values[name]:,.2f}" for name in _COLUMNS))
    return table


def sweep_table(results: list[dict[str, Any]]) -> Table:
    """A row for each point."""
    goodput = any("goodput" in result for result in results)
    table = _table(
        "LOAD",
        "REQ/S",
        "OUT TOK/S",
        *(["GOOD REQ/S"] if goodput else []),
        *(f"{measure.upper()} {which}" for measure in _MEASURES for which in ("p50", "p99")),
        "FAILED",
        "WARNINGS",
    )
    for result in results:
        latencies = [
            f"{result[f'{measure}_ms'][which]:,.1f}" if result[f"{measure}_ms"] else ""
            for measure in _MEASURES
            for which in ("p50", "p99")
        ]
        table.add_row(
            result["load"]["text"],
            f"{result['requests_per_s']:,.2f}",
            f"{result['output_tokens_per_s']:,.0f}",
            *([f"{result['goodput']['requests_per_s']:,.2f}"] if goodput else []),
            *latencies,
            f"{result['requests']['failed']:,}",
            f"{len(result['client']['warnings'])}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table
