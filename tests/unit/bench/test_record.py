"""A record says what is needed to repeat a run, and is never found half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.bench.record import LINE_WIDTH, compact_json, describe_run, write_record


def test_a_run_is_described_by_command_machine_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pagewire", "bench", "throughput", "a model"])
    run = describe_run("throughput")
    assert run["command"] == "pagewire bench throughput 'a model'"
    assert set(run["machine"]) == {"cpu", "cores", "memory_gib", "gpus"}
    assert {"python", "torch", "triton"} <= set(run["versions"])


def test_the_commit_of_a_copy_without_its_repository_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pagewire.bench.record._output", lambda *command: "")
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    assert describe_run("startup")["commit"] == "abc123"
    assert describe_run("startup")["machine"]["gpus"] == []


def test_gpus_are_described_as_nvidia_smi_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pagewire.bench.record._output",
        lambda *command: "NVIDIA H200, 143771 MiB, 580.1" if command[0] == "nvidia-smi" else "",
    )
    [gpu] = describe_run("latency")["machine"]["gpus"]
    assert gpu == {"name": "NVIDIA H200", "memory.total": "143771 MiB", "driver_version": "580.1"}


def test_a_record_takes_the_place_of_a_shorter_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_record(path, {"options": {"profile": Path("/tmp/p")}})
    write_record(path, {"results": [1, 2]})
    assert json.loads(path.read_text()) == {"results": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=30), inner, max_size=5),
)


@given(JSON)
def test_compact_json_says_the_same(value: object) -> None:
    assert json.loads(compact_json(value)) == value


def test_a_list_or_object_without_others_in_it_has_one_line() -> None:
    series = list(range(LINE_WIDTH))
    assert compact_json({"series": series, "few": {"a": {"b": 1}}}).splitlines() == [
        "{",
        f' "series": {json.dumps(series)},',
        ' "few": {"a": {"b": 1}}',
        "}",
    ]
