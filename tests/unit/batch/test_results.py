"""Files of results: repaired, locked, and never mistaken for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.batch.results import ResultFile

OPENING = b'{"id": "'


def line(number: int, length: int = 4) -> bytes:
    return OPENING + b"%d" % number + b"x" * length + b'"}'


def test_appended_lines_are_there_in_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResultFile(path, OPENING) as file:
        assert list(file.lines()) == []
        file.append([line(1), line(2)])
    with ResultFile(path, OPENING) as file:
        file.append([line(3)])
        assert list(file.lines()) == [line(1), line(2), line(3)]


@pytest.mark.parametrize("torn", [b"{", OPENING, line(3), line(3, 200_000)])
@pytest.mark.parametrize("whole", [[], [line(1), line(2)]])
def test_a_torn_last_line_is_cut_off_and_the_others_stay(tmp_path: Path, torn: bytes, whole: list) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"".join(each + b"\n" for each in whole) + torn)
    with ResultFile(path, OPENING) as file:
        file.append([line(4)])
        assert list(file.lines()) == [*whole, line(4)]


@pytest.mark.parametrize(
    "content", [b"a novel", b"a novel\n", line(1) + b"\nand a novel", line(1) + b"\nabc\n"]
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no file of results"), ResultFile(path, OPENING) as file:
        list(file.lines())
    assert path.read_bytes() == content


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "out", OPENING):
        with pytest.raises(ConfigError, match="being written by another run"):
            ResultFile(tmp_path / "out", OPENING)
    with ResultFile(tmp_path / "out", OPENING):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/dev/null is no ordinary file"):
        ResultFile(Path("/dev/null"), OPENING)
    with pytest.raises(ConfigError, match="nowhere/out: No such file or directory"):
        ResultFile(tmp_path / "nowhere" / "out", OPENING)
