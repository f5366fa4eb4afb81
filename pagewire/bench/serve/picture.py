"""The picture of a sweep: what a server delivers against how long its clients wait, as SVG.

It is written here because it is two panels of lines: a plotting library would be a large dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape  # nosec B406 # writes, parses nothing

WIDTH, HEIGHT = 980, 420
PANEL_WIDTH, PANEL_HEIGHT, TOP, LEFT, GAP = 360, 270, 70, 80, 130
_WIDEST = 1e6
"""Between the ends of a logarithmic axis; what is less is drawn at its end."""
_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f")
_PANELS = (("ttft_ms", "time to first token, ms"), ("itl_ms", "gap between tokens, ms"))
_LINES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to places.

    Attributes:
        least, most: values at its ends.
        logarithmic: whether equal lengths are equal ratios.
    """

    least: float
    most: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        """One that holds all values, which are not negative. Logarithmic where they span more than a factor
        of 20."""
        positive = [value for value in values if value > 0]
        if positive and max(positive) > 20 * min(positive):
            least = max(min(positive), max(positive) / _WIDEST)
            return cls(10 ** math.floor(math.log10(least)), max(positive) * 1.15, True)
        return cls(0.0, max([*values, 1e-9]) * 1.1)

    def place(self, value: float) -> float:
        """0 at one end, 1 at the other."""
        if not self.logarithmic:
            return (value - self.least) / (self.most - self.least)
        value = max(value, self.least)
        return math.log(value / self.least) / math.log(self.most / self.least)

    def ticks(self) -> list[float]:
        """Round values along it."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.least)), math.ceil(math.log10(self.most))
            factors = (1, 2, 5) if last - first < 4 else (1,)
            values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            return [value for value in values if self.least <= value <= self.most]
        step = 10 ** math.floor(math.log10(self.most / 4))
        step *= max(factor for factor in (1, 2, 5) if factor * step <= self.most / 4 or factor == 1)
        return [index * step for index in range(int(self.most / step) + 1)]


def picture(results: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of a sweep's points: output tokens a second against TTFT, and against ITL. Each point names its
    load. Points that measured nothing are left out."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="30" font-size="15">{escape(title)}</text>',
    ]
    for number, (measure, label) in enumerate(_PANELS):
        points = [result for result in results if result[measure]]
        parts += _panel(LEFT + number * (PANEL_WIDTH + GAP), points, measure, label)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: float, points: Sequence[dict[str, Any]], measure: str, label: str) -> list[str]:
    bottom = TOP + PANEL_HEIGHT
    across = Axis.of([point["output_tokens_per_s"] for point in points])
    up = Axis.of([point[measure][line] for point in points for line in _LINES])
    parts = []
    for tick in up.ticks():
        y = bottom - up.place(tick) * PANEL_HEIGHT
        parts.append(_line([(left, y), (left + PANEL_WIDTH, y)], "#e4e4e4"))
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in across.ticks():
        x = left + across.place(tick) * PANEL_WIDTH
        parts.append(_line([(x, bottom), (x, bottom + 5)], "#888"))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:,g}</text>')
    parts.append(_line([(left, TOP), (left, bottom), (left + PANEL_WIDTH, bottom)], "#888"))
    parts.append(
        f'<text x="{left + PANEL_WIDTH / 2}" y="{bottom + 42}" text-anchor="middle">output tokens/s</text>'
    )
    parts.append(f'<text x="{left}" y="{TOP - 14}">{escape(label)}</text>')
    for number, line in enumerate(_LINES):
        places = [
            (
                left + across.place(point["output_tokens_per_s"]) * PANEL_WIDTH,
                bottom - up.place(point[measure][line]) * PANEL_HEIGHT,
            )
            for point in points
        ]
        parts += _series(places, points, _COLOURS[number], names=line == _LINES[-1])
        x = left + PANEL_WIDTH - 120 + 44 * number
        parts.append(f'<text x="{x}" y="{TOP - 14}" fill="{_COLOURS[number]}">{line}</text>')
    return parts


def _series(
    places: Sequence[tuple[float, float]], points: Sequence[dict[str, Any]], colour: str, *, names: bool
) -> list[str]:
    parts = [_line(places, colour, width=2)]
    for (x, y), point in zip(places, points, strict=True):
        text = escape(point["load"]["text"])
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{text}</title></circle>'
        )
        if names:
            parts.append(
                f'<text x="{x - 6:.1f}" y="{y - 5:.1f}" font-size="10" text-anchor="end">{text}</text>'
            )
    return parts


def _line(places: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
