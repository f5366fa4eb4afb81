"""Lines over an axis, or bars, as SVG: what the load generator draws of a sweep and the soak of a run.

It is written here because it is a few panels of lines: a plotting library would be a large dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape  # nosec B406 # writes, parses nothing

HEIGHT, PANEL_HEIGHT, TOP, LEFT, GAP = 420, 270, 70, 80, 130
LEGEND, CHARACTER = 14, 7
"""Pixels between a panel and its legend, and about as many as a character is wide."""
_WIDEST = 1e6
"""Between the ends of a logarithmic axis; what is less is drawn at its end."""
_BARS_SHARE = 0.8
"""Of the width, the share that bars take; the rest is between those of one index and the next."""
_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#c78a1e")


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
        return cls.from_zero(values)

    @classmethod
    def from_zero(cls, values: Sequence[float]) -> Axis:
        """One that holds all values, which are not negative, and begins at 0."""
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


@dataclass(frozen=True, slots=True)
class Series:
    """A line.

    Attributes:
        name: in the legend.
        points: (x, y) along it.
        marks: a text for each point, which is then a dot that shows it; none for a bare line.
        has_labels: whether these texts stand beside the dots, too.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[str] = ()
    has_labels: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines that share their axes.

    Attributes:
        title: what is drawn upwards.
        x_label: what is drawn across.
        x, y: the axes; they hold every point.
        width: in pixels, without what is written around it.
        bars: the names of 0, 1, ... across; if given, each point (index, height) is a bar with its height
            written on it, those of one index beside each other.
    """

    title: str
    x_label: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    width: int = 360
    bars: Sequence[str] = ()


def draw(title: str, panels: Sequence[Panel]) -> str:
    """An SVG of panels side by side."""
    names = [series.name for series in panels[-1].series]
    legend = LEGEND + CHARACTER * max(map(len, names), default=0)
    width = LEFT + sum(panel.width for panel in panels) + GAP * (len(panels) - 1) + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="30" font-size="15">{escape(title)}</text>',
    ]
    left = LEFT
    for panel in panels:
        parts += _axes(panel, left)
        for number, series in enumerate(panel.series):
            colour = _COLOURS[number % len(_COLOURS)]
            if panel.bars:
                parts += _bars(panel, series, number, left, colour)
            else:
                parts += _series(panel, series, left, colour)
            x, y = left + panel.width + LEGEND, TOP + 12 + 20 * number
            parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escape(series.name)}</text>')
        left += panel.width + GAP
    return "\n".join([*parts, "</svg>", ""])


def _axes(panel: Panel, left: float) -> list[str]:
    right, bottom = left + panel.width, TOP + PANEL_HEIGHT
    parts = [f'<text x="{left}" y="{TOP - 14}">{escape(panel.title)}</text>']
    for tick in panel.y.ticks():
        y = bottom - panel.y.place(tick) * PANEL_HEIGHT
        parts.append(_line([(left, y), (right, y)], "#e4e4e4"))
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    named: Iterable[tuple[float, str]] = enumerate(panel.bars)
    for tick, name in named if panel.bars else ((tick, f"{tick:,g}") for tick in panel.x.ticks()):
        x = left + panel.x.place(tick) * panel.width
        parts.append(_line([(x, bottom), (x, bottom + 5)], "#888"))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{escape(name)}</text>')
    parts.append(_line([(left, TOP), (left, bottom), (right, bottom)], "#888"))
    middle = left + panel.width / 2
    parts.append(f'<text x="{middle}" y="{bottom + 42}" text-anchor="middle">{escape(panel.x_label)}</text>')
    return parts


def _series(panel: Panel, series: Series, left: float, colour: str) -> list[str]:
    places = [
        (left + panel.x.place(x) * panel.width, TOP + (1 - panel.y.place(y)) * PANEL_HEIGHT)
        for x, y in series.points
    ]
    parts = [_line(places, colour, width=2)]
    for (x, y), mark in zip(places, series.marks, strict=False):
        text = escape(mark)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{text}</title></circle>'
        )
        if series.has_labels:
            parts.append(
                f'<text x="{x - 6:.1f}" y="{y - 5:.1f}" font-size="10" text-anchor="end">{text}</text>'
            )
    return parts


def _bars(panel: Panel, series: Series, number: int, left: float, colour: str) -> list[str]:
    """The bars of the series that is the `number`th at each index."""
    width = _BARS_SHARE * panel.width / len(panel.bars) / len(panel.series)
    parts = []
    for index, height in series.points:
        x = left + panel.x.place(index) * panel.width + (number - len(panel.series) / 2) * width
        pixels = panel.y.place(height) * PANEL_HEIGHT
        y = TOP + PANEL_HEIGHT - pixels
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{pixels:.1f}" fill="{colour}"/>'
        )
        parts.append(
            f'<text x="{x + width / 2:.1f}" y="{y - 5:.1f}" font-size="10" text-anchor="middle">'
            f"{height:,.{1 if height < 100 else 0}f}</text>"
        )
    return parts


def _line(places: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
