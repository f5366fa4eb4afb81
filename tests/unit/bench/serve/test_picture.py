"""The picture shows every point where its figures say."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from pagewire.bench.serve.picture import picture

NAMESPACE = "{http://www.w3.org/2000/svg}"


def point(tokens: float, latency: float | None, text: str = "1 per second") -> dict[str, Any]:
    figures = None if latency is None else {"p50": latency, "p90": latency * 2, "p99": latency * 3}
    return {"output_tokens_per_s": tokens, "ttft_ms": figures, "itl_ms": figures, "load": {"text": text}}


def test_every_point_is_there_and_more_is_further_out() -> None:
    results = [point(100, 20, "1 per second"), point(190, 30, "2 & <more>"), point(0, None)]
    root = ElementTree.fromstring(picture(results, "model at url"))
    circles = root.findall(f"{NAMESPACE}circle")
    assert len(circles) == 2 * 3 * 2  # panels, percentiles, points that measured something
    places = [(float(circle.get("cx", 0)), float(circle.get("cy", 0))) for circle in circles]
    for first, second in zip(places[::2], places[1::2], strict=True):
        assert second[0] > first[0]
        assert second[1] < first[1]
    assert {circle[0].text for circle in circles} == {"1 per second", "2 & <more>"}


@pytest.mark.parametrize("results", [[], [point(0, None)], [point(5, 1)], [point(1, 0.0), point(1, 0.0)]])
def test_pictures_of_little_are_pictures_too(results: list[dict[str, Any]]) -> None:
    drawn = picture(results, "a < b")
    ElementTree.fromstring(drawn)
    assert not re.search(r"nan|inf\b", drawn)
