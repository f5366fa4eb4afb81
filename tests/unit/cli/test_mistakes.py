"""Whatever is typed wrong gets one answer that helps, and never a traceback; help shows what to type."""

from __future__ import annotations

import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from pagewire.cli.main import app, main


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No service, no model and no setting of the user's is seen."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PAGEWIRE_API_KEY", raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `pagewire ARGUMENTS`. Any other exception than SystemExit would be a traceback."""
    monkeypatch.setattr(sys, "argv", ["pagewire", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command by the words that name it."""
    todo: list[tuple[tuple[str, ...], click.Command]] = [((), typer.main.get_command(app))]
    while todo:
        name, command = todo.pop()
        yield name, command
        for word, child in getattr(command, "commands", {}).items():
            todo.append(((*name, word), child))


MISTAKES = [
    ("srve", "Did you mean 'serve'?"),
    ("serve --prt 1", "--port"),
    ("serve smolm2-135m", "did you mean 'smollm2-135m'?"),
    ("serve no-such-model", "'pagewire models' what is in"),
    ("serve --port 99999", "port is 99999; it must be between 0 and 65535"),
    ("serve --frontends 0", "frontends is 0; it must be at least 1"),
    ("serve a b", "unexpected extra argument"),
    ("frontend smollm2-135m", "Missing option '--scheduler'"),
    ("scheduler", "Missing option '--listen'"),
    ("chat --url http://localhost:8000", "give the server's gRPC address"),
    ("chat --url ''", "--url is empty"),
    ("chat --url 127.0.0.1:1", "'pagewire serve smollm2-135m' starts one"),
    ("chat --tools {dir}", "cannot be read: Is a directory"),
    ("chat --tools {file}", "is no JSON list of tools"),
    ("chat --temperature warm --url x", "'--temperature'"),
    ("chat --temperature -1", "temperature is -1.0; it must be at least 0"),
    ("generate smollm2-135m", "Missing argument 'PROMPT'"),
    ("generate m text --url 127.0.0.1:1", "'pagewire serve m' starts one"),
    ("generate m text --url 127.0.0.1:1 --dtype float32", "--dtype float32 concerns a server started here"),
    ("pull no-such-model", "name a model on a hub (owner/name) or one of"),
    ("pull {dir}", "cannot be fetched"),
    ("pull owner/model --hub gitee", "it must be one of huggingface, modelscope"),
    ("models --alias", "--aliases"),
    ("top", "'pagewire serve MODEL' starts one"),
    ("top --once --url 127.0.0.1:1", "'pagewire serve MODEL --port PORT' starts a service"),
    ("top --interval 0", "'--interval'"),
    ("lora load sql", "Missing argument 'PATH'"),
    ("lora list", "'pagewire serve MODEL --enable-lora' starts one"),
    ("lora unload sql --url 127.0.0.1:1", "'pagewire serve MODEL --port PORT' starts a service"),
    ("lora lst", "Did you mean 'list'?"),
    ("drain", "'pagewire serve' starts one"),
    ("drain --socket {file}", "is no socket"),
    ("drain --timeout -1", "'--timeout'"),
    ("warmup smollm2-135m --target sm_1", "without such a GPU it must be one of sm_80"),
    ("bench serve --url 127.0.0.1:1", "it must be http://HOST:PORT"),
    ("bench strategies --strategies x", "it must be one or more of none, static, dynamic, inflight"),
    ("bench serv", "Did you mean 'serve'?"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_answered_with_what_to_type(
    line: str, message: str, apart: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (apart / "file").write_bytes(b"\xff")
    words = [word.format(dir=apart, file=apart / "file") for word in shlex.split(line)]
    assert run(monkeypatch, *words) in (1, 2)
    shown = capfd.readouterr()
    assert message in " ".join(shown.err.split())
    assert shown.out == ""


def test_bytes_that_are_no_utf8_are_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", "m", "a\udcff", "--url", "127.0.0.1:1") == 1  # nobody is asked
    monkeypatch.setattr("pagewire.cli.arguments._served_name", lambda client, model, url: model)
    assert run(monkeypatch, "generate", "m", "a\udcff", "--url", "127.0.0.1:1") == 2
    assert "is not UTF-8" in capfd.readouterr().err


def test_a_file_that_cannot_be_written_is_named(
    apart: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def list_nothing() -> None:
        (apart / "no" / "file").write_text("")

    monkeypatch.setattr("pagewire.hub.list_models", list_nothing)
    assert run(monkeypatch, "models") == 1
    assert capfd.readouterr().err == f"pagewire: {apart}/no/file: No such file or directory\n"


def test_every_commands_help_ends_with_examples_that_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").touch()  # which examples read
    tree = dict(commands())
    for name, command in tree.items():
        if name == ("engine-worker",):
            continue  # its help is that of the command `engine-worker`
        with click.Context(command, info_name=" ".join(("pagewire", *name))) as context:
            _, _, examples = command.get_help(context).partition("Examples:\n")
        assert examples, f"pagewire {' '.join(name)} has no examples"
        for line in examples.splitlines():
            check_example(line, tree)


def check_example(line: str, tree: dict[tuple[str, ...], click.Command]) -> None:
    """Its command exists and takes its options; it is not run."""
    assert len(line) < 110, line
    words = shlex.split(line, comments=True)
    words = words[words.index("pagewire") + 1 :]
    for end in ("|", "<"):
        words = words[: words.index(end)] if end in words else words
    name = tuple(words[:2]) if tuple(words[:2]) in tree else tuple(words[:1])
    if name in tree:
        tree[name].make_context(" ".join(name), words[len(name) :])
    else:
        assert words == ["--install-completion"]


@pytest.mark.parametrize(
    ("shell", "typed", "expected"),
    [
        ("bash", "pagewire serve smo", "smollm2-135m"),
        ("bash", "pagewire ser", "serve"),
        ("zsh", "pagewire pull yi-6b-ch", '"yi-6b-chat":"01-ai/Yi-6B-Chat"'),
        ("zsh", "pagewire serve --hub mod", "modelscope"),
        ("fish", "pagewire bench throughput llama8", "llama8b"),
        ("fish", "pagewire chat --temp", "--temperature"),
    ],
)
def test_tab_completes_commands_options_and_models(
    shell: str, typed: str, expected: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_PAGEWIRE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert run(monkeypatch) == 0
    assert expected in capfd.readouterr().out


def test_a_port_that_speaks_another_protocol_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        port = server.getsockname()[1]
        assert run(monkeypatch, "top", "--once", "--url", f"127.0.0.1:{port}") == 1
        thread.join()
    assert "does not speak HTTP" in capfd.readouterr().err


def test_a_pull_is_quiet_without_a_terminal_and_says_when_it_can_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, bool]] = []

    def interrupted(name: str, *, progress: bool) -> Path:
        asked.append((name, progress))
        raise KeyboardInterrupt

    monkeypatch.setattr("pagewire.hub.pull", interrupted)
    assert run(monkeypatch, "pull", "owner/model") == 130
    assert capfd.readouterr().err == "interrupted; the same command goes on from here\n"
    assert run(monkeypatch, "pull", "smollm2-135m") == 130
    assert capfd.readouterr().err == ""
    assert asked == [("owner/model", False), ("smollm2-135m", False)]
