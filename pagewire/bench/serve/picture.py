"""The picture of a sweep: what a server delivers against how long its clients wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagewire.bench.picture import Axis, Panel, Series, draw

_PANELS = (("ttft_ms", "time to first token, ms"), ("itl_ms", "gap between tokens, ms"))
_LINES = ("p50", "p90", "p99")


def picture(results: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of a sweep's points: output tokens a second against TTFT, and against ITL. Each point names its
    load. Points that measured nothing are left out."""
    return draw(title, [_panel(results, measure, label) for measure, label in _PANELS])


def _panel(results: Sequence[dict[str, Any]], measure: str, label: str) -> Panel:
    points = [result for result in results if result[measure]]
    marks = [point["load"]["text"] for point in points]
    series = [
        Series(
            line,
            [(point["output_tokens_per_s"], point[measure][line]) for point in points],
            marks,
            has_labels=line == _LINES[-1],
        )
        for line in _LINES
    ]
    across = Axis.of([point["output_tokens_per_s"] for point in points])
    up = Axis.of([y for each in series for _, y in each.points])
    return Panel(label, "output tokens/s", across, up, series)
