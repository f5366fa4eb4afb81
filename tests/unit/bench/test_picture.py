"""Lines are drawn where their values say, and nothing in a text breaks the SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.picture import Axis, Panel, Series, draw

NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_lines_without_marks_have_no_dots_and_each_has_a_name_in_its_colour() -> None:
    axis = Axis.from_zero([0, 9])
    lines = [Series("a < b", [(0, 1), (9, 9)]), Series("c & d", [(0, 2), (9, 0)])]
    root = ElementTree.fromstring(draw("title", [Panel("up", "across", axis, axis, lines)]))
    assert not root.findall(f"{NAMESPACE}circle")
    drawn = {line.get("stroke"): line.get("points") for line in root.findall(f"{NAMESPACE}polyline")}
    colours = {text.text: text.get("fill") for text in root.findall(f"{NAMESPACE}text") if text.get("fill")}
    assert list(colours) == ["a < b", "c & d"]
    first, second = (str(drawn[colour]).split() for colour in colours.values())
    assert float(first[1].split(",")[1]) < float(first[0].split(",")[1])  # more is further up
    assert float(second[1].split(",")[1]) > float(second[0].split(",")[1])


def test_bars_of_one_name_stand_beside_each_other_and_are_as_high_as_their_values() -> None:
    lines = [Series("p50", [(0, 1), (1, 4)]), Series("p99", [(0, 2), (1, 8)])]
    panel = Panel("up", "", Axis(-0.5, 1.5), Axis.from_zero([8]), lines, bars=["a < b", "c"])
    root = ElementTree.fromstring(draw("title", [panel]))
    texts = [text.text for text in root.findall(f"{NAMESPACE}text")]
    assert {"a < b", "c", "1.0", "8.0"} <= set(texts)
    bars = [bar for bar in root.findall(f"{NAMESPACE}rect") if bar.get("y") is not None]
    heights = [float(str(bar.get("height"))) for bar in bars]
    assert heights == [pytest.approx(heights[0] * times, abs=0.3) for times in (1, 4, 2, 8)]
    left = [float(str(bar.get("x"))) for bar in bars]
    width = float(str(bars[0].get("width")))
    assert left[2] - left[0] == pytest.approx(width, abs=0.2)
    assert left[1] > left[2] + width
    assert not root.findall(f"{NAMESPACE}circle")


@given(st.lists(st.floats(0, 1e7), max_size=8))
def test_an_axis_holds_its_values_and_keeps_their_order(values: list[float]) -> None:
    axis = Axis.of(values)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 for place in places)
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert 1 <= len(ticks) <= 14
