"""The command from outside: exit statuses, and what it says when something is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire import __version__


def pagewire(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({} if home is None else {"PAGEWIRE_HOME": str(home)})}
    command = [sys.executable, "-m", "pagewire", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_version() -> None:
    assert pagewire("--version").stdout == f"pagewire {__version__}\n"


def test_options_are_named_alike_whatever_their_metavar() -> None:
    """typer 0.27 takes a name from a metavar that differs only in case; every other release has --url."""
    assert "\n  --url URL" in pagewire("bench", "serve", "--help").stdout


def test_help_names_every_command() -> None:
    text = pagewire("--help").stdout
    commands = (
        "serve",
        "frontend",
        "scheduler",
        "engine-worker",
        "chat",
        "generate",
        "pull",
        "models",
        "warmup",
    )
    for command in commands:
        assert f"\n  {command}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "no-such-model"), "pagewire: unknown model 'no-such-model'"),
        (("serve", "--dtype", "int4"), "pagewire: dtype is 'int4'"),
        (("serve", "--port", "none"), "Invalid value for '--port'"),
        (("serve", "--no-such-option"), "No such option"),
        (("scheduler",), "Missing option '--listen'"),
        (("pull", "no-such-model"), "pagewire: 'no-such-model' cannot be fetched"),
        (("no-such-command",), "No such command 'no-such-command'"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_with_status_2(
    arguments: tuple[str, ...], message: str
) -> None:
    run = pagewire(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_serve_refuses_a_port_in_use_before_it_starts_anything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        run = pagewire("serve", str(tmp_path), "--host", "127.0.0.1", "--port", port, "--grpc-port", "0")
    assert run.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in run.stderr
    assert "starting" not in run.stdout


def test_models_lists_what_can_be_fetched(tmp_path: Path) -> None:
    run = pagewire("models", home=tmp_path)
    assert run.returncode == 0
    assert "smollm2-135m" in run.stdout
    assert "to fetch" in run.stdout


def test_models_lists_whole_names_and_what_aliases_stand_for(tmp_path: Path) -> None:
    name = f"a-model-with-a-name-that-is-wider-{'than-a-terminal-' * 5}"
    (tmp_path / "modelscope" / "models" / f"owner--{name}").mkdir(parents=True)
    lines = pagewire("models", home=tmp_path).stdout.splitlines()
    assert [f"modelscope:owner/{name}", "0", "MB", "ModelScope"] in [line.split() for line in lines]
    lines = pagewire("models", "--aliases").stdout.splitlines()
    assert ["yi-6b-chat", "01-ai/Yi-6B-Chat", "01ai/Yi-6B-Chat"] in [line.split() for line in lines]


def test_commands_take_where_a_model_is(tmp_path: Path) -> None:
    for command in ("pull", "serve"):
        run = pagewire(command, "owner/model", "--hub", "gitee", home=tmp_path)
        assert run.returncode == 2
        assert run.stderr == "pagewire: hub is 'gitee'; it must be one of huggingface, modelscope\n"
