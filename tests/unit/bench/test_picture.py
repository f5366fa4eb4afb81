"""Lines are drawn where their values say, and nothing in a text breaks the SVG."""

from __future__ import annotations

from xml.etree import ElementTree

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


@given(st.lists(st.floats(0, 1e7), max_size=8))
def test_an_axis_holds_its_values_and_keeps_their_order(values: list[float]) -> None:
    axis = Axis.of(values)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 for place in places)
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert 1 <= len(ticks) <= 14
