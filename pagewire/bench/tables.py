"""Results for people: a line as soon as something is measured, a table when everything is."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def throughput_table(results: dict[str, dict[str, Any]], targets: dict[str, dict[str, float]]) -> Table:
    """One row a workload: the median and its spread, the steps of a run, and the figures to beat."""
    columns = ["WORKLOAD", "REQUESTS", "TOKENS/S", "OF", "MIN", "MAX", "S", "STEPS", "MS/STEP", "PREEMPTED"]
    table = _table(*columns, *_target_columns(targets))
    for name, result in results.items():
        unit, runs = result["unit"], result["runs"]
        figures = sorted(run[unit] for run in runs)
        middle = sorted(runs, key=lambda run: run[unit])[len(runs) // 2]
        steps = result["steps"]
        row = [
            name,
            result["workload"],
            f"{result['tokens_per_s']:,.0f}",
            unit.partition("_")[0],
            f"{figures[0]:,.0f}",
            f"{figures[-1]:,.0f}",
            f"{middle['seconds']:.2f}",
            f"{steps['num_steps']:,}",
            f"{steps['step_us'] / 1000:.2f}",
            f"{steps['num_preemptions']:,}",
        ]
        table.add_row(*row, *_against(result["tokens_per_s"], targets, name))
    return table


def latency_table(results: dict[str, dict[str, Any]]) -> Table:
    """One row a workload and measure, in milliseconds."""
    table = _table("WORKLOAD", "REQUESTS", "BATCH", "MS", "MEAN", "P50", "P90", "P99", "MAX")
    for name, result in results.items():
        for measure in ("ttft", "tpot", "itl", "e2e"):
            values = result.get(f"{measure}_ms")
            if values is not None:
                figures = [f"{values[key]:,.2f}" for key in ("mean", "p50", "p90", "p99", "max")]
                table.add_row(name, result["workload"], str(result["batch_size"]), measure, *figures)
    return table


def startup_table(results: dict[str, dict[str, Any]], targets: dict[str, dict[str, float]]) -> Table:
    """One row a kind of start, in seconds."""
    processes = list(results["cold"]["ready_by_process_s"])
    headings = [f"{name.upper()} READY" for name in processes]
    table = _table("CACHES", "READY S", "THEN FIRST TOKEN", *headings, *_target_columns(targets))
    for kind, result in results.items():
        by_process = [f"{result['ready_by_process_s'][name]:.2f}" for name in processes]
        row = [kind, f"{result['ready_s']:.2f}", f"{result['first_token_after_ready_s']:.3f}", *by_process]
        table.add_row(*row, *_against(result["ready_s"], targets, kind))
    return table


def throughput_line(name: str, result: dict[str, Any]) -> str:
    """One workload's figure."""
    count = len(result["runs"])
    unit = result["unit"].partition("_")[0]
    runs = f"median of {count} runs" if count > 1 else "one run"
    return f"{name} {result['workload']}: {result['tokens_per_s']:,.0f} {unit} tokens/s ({runs})"


def latency_line(name: str, result: dict[str, Any]) -> str:
    """One workload's medians."""
    parts = [
        f"{measure} {result[f'{measure}_ms']['p50']:,.2f} ms"
        for measure in ("ttft", "tpot")
        if f"{measure}_ms" in result
    ]
    return f"{name} {result['workload']} in batches of {result['batch_size']}: {', '.join(parts)} (medians)"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 and len(columns) > 8 else "right", no_wrap=True)
    return table


def _target_columns(targets: dict[str, dict[str, float]]) -> list[str]:
    return ["PEER", "GOAL", "OF GOAL"] if any(targets.values()) else []


def _against(value: float, targets: dict[str, dict[str, float]], name: str) -> list[str]:
    if not any(targets.values()):
        return []
    target = targets.get(name)
    if not target:
        return ["", "", ""]
    return [f"{target['peer']:,.0f}", f"{target['goal']:,.0f}", f"{value / target['goal']:.0%}"]
