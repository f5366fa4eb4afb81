"""Nothing past a stop string is ever released, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.text.stop_strings import StopStringMatcher

FEW_LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def run(stop: list[str], pieces: list[str], *, include: bool) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stop, include_in_output=include)
    released = [matcher.push(piece) for piece in pieces]
    return "".join(released) + matcher.flush(), matcher.matched


def first_match(stop: list[str], text: str, *, include: bool) -> tuple[str, str | None]:
    """By definition: read one character more until the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if ending:
            matched = max(ending, key=len)
            return text[: end if include else end - len(matched)], matched
    return text, None


@given(STOPS, FEW_LETTERS, st.booleans(), st.data())
def test_the_result_is_the_first_match_however_the_text_is_cut(
    stop: list[str], text: str, include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    borders = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert run(stop, pieces, include=include) == first_match(stop, text, include=include)


@given(STOPS, FEW_LETTERS)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(stop: list[str], text: str) -> None:
    matcher = StopStringMatcher(stop, include_in_output=False)
    released = "".join(matcher.push(letter) for letter in text)
    if matcher.matched is None:
        held = text[len(released) :]
        assert text.startswith(released)
        assert held == "" or any(candidate.startswith(held) for candidate in stop)
        assert not any(
            candidate.startswith(text[start:]) for candidate in stop for start in range(len(released))
        )


def test_a_stop_string_across_pieces_is_found() -> None:
    matcher = StopStringMatcher(["\nUser:"], include_in_output=False)
    assert [matcher.push(piece) for piece in ("Hi", ".\n", "Us", "er: more")] == ["Hi", ".", "", ""]
    assert matcher.matched == "\nUser:"
    assert matcher.push("anything") == ""
    assert matcher.flush() == ""


def test_a_false_beginning_is_released_as_soon_as_it_is_one() -> None:
    matcher = StopStringMatcher(["STOP"], include_in_output=False)
    assert [matcher.push(piece) for piece in ("a ST", "A", "STO")] == ["a ", "STA", ""]
    assert matcher.flush() == "STO"
    assert matcher.matched is None


def test_the_stop_string_is_shown_on_request() -> None:
    assert run(["END"], ["one EN", "D two"], include=True) == ("one END", "END")


def test_without_stop_strings_all_text_passes() -> None:
    assert run([], ["a", "b"], include=False) == ("ab", None)


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["a", ""], include_in_output=False)
