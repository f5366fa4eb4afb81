"""Something gets into the cache whole or not at all, whoever else is at work and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError
from pagewire.hub.cache import publish, require_free_space

# Builds cache/things/one slowly, and says on stdout that it has begun.
BUILDER = """
import sys, time
from pathlib import Path
from pagewire.base.cache_home import cache_home
from pagewire.hub.cache import publish

def build(staging):
    print("building", flush=True)
    (staging / "half").write_text("1")
    time.sleep(float(sys.argv[1]))
    (staging / "other half").write_text("2")

publish(cache_home() / "things" / "one", build, on_wait=lambda: print("waiting", flush=True))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def start_builder(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )


def finish_now(staging: Path) -> None:
    (staging / "whole").write_text("1")


def never_wait() -> None:
    raise AssertionError("nobody else is building")


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_cache_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_home() == home
    monkeypatch.delenv("PAGEWIRE_HOME")
    assert cache_home() == Path.home() / ".cache" / "pagewire"


def test_what_is_there_is_not_built_again(home: Path) -> None:
    target = publish(home / "things" / "one", finish_now, on_wait=never_wait)
    assert publish(target, lambda staging: never_wait(), on_wait=never_wait) == target
    assert contents(target) == ["whole"]


def test_a_builder_that_fails_leaves_nothing(home: Path) -> None:
    def fail(staging: Path) -> None:
        (staging / "half").write_text("1")
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        publish(home / "things" / "one", fail, on_wait=never_wait)
    assert contents(home / "things") == []


def test_a_builder_that_is_killed_leaves_nothing_that_others_see(home: Path) -> None:
    builder = start_builder(60)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "building\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not (home / "things" / "one").exists()
    publish(home / "things" / "one", finish_now, on_wait=never_wait)
    assert contents(home / "things") == ["one"]
    assert contents(home / "things" / "one") == ["whole"]


def test_of_two_processes_one_builds_and_the_other_waits(home: Path) -> None:
    first = start_builder(0.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = start_builder(0)
    output, _ = second.communicate(timeout=60)
    assert output == "waiting\n"
    assert contents(home / "things" / "one") == ["half", "other half"]
    assert first.wait(timeout=60) == 0


def test_a_cache_that_cannot_be_written_is_named(home: Path) -> None:
    home.write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match="PAGEWIRE_HOME"):
        publish(home / "things" / "one", finish_now, on_wait=never_wait)


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1, "a byte")
    with pytest.raises(ConfigError, match="the moon needs 1,000,000,000,000 MB"):
        require_free_space(tmp_path, 10**18, "the moon")


def test_a_waiting_process_uses_no_processor_time(home: Path) -> None:
    first = start_builder(1.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    before = time.process_time()
    publish(home / "things" / "one", lambda staging: never_wait(), on_wait=lambda: None)
    assert time.process_time() - before < 0.2
    assert first.wait(timeout=60) == 0
