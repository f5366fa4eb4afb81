"""The commands and programs in the documentation, and how they are run.

A snippet is a fenced block of one of LANGUAGES. It is run as it stands against a service, unless the line
before it is an HTML comment, its mark:

    <!-- prints TEXT -->          it is run, and what it prints has this text
    <!-- needs PROGRAM -->        it is run where this program is installed
    <!-- parsed -->               its commands serve or fetch something: their options are checked instead
    <!-- tested by tests/... -->  that test runs it, against a service of its own
    <!-- not run: REASON -->      no test can: test_docs.py counts these
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from pagewire.base.own_packages import python_command, python_path
from pagewire.cli.main import app
from tools.service import Service

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("sh", "bash", "python", "js", "go")
_SETTING_UP = ("git", "cd", "export", "pip", "docker")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Snippet:
    """A block of a page: its page's path in the repository, its line, its mark."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    @property
    def action(self) -> str:
        """The mark's first word; "run" where there is none."""
        return self.mark.split(" ")[0] if self.mark else "run"

    @property
    def detail(self) -> str:
        """What the mark says of it."""
        return self.mark.partition(": " if self.action == "not" else " ")[2].removeprefix("by ")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """The snippets of a page."""
    text = page.read_text()
    return [
        Snippet(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["mark"] or "",
            found["text"],
        )
        for found in _BLOCK.finditer(text)
        if found["language"] in LANGUAGES
    ]


def missing_program(snippet: Snippet) -> str | None:
    """The program that a snippet needs and that is not installed."""
    needed = [{"js": "node", "go": "go", "sh": "bash", "bash": "bash"}.get(snippet.language)]
    if snippet.action == "needs":
        needed.append(snippet.detail)
    return next((name for name in needed if name and shutil.which(name) is None), None)


def run(snippet: Snippet, service: Service, directory: Path) -> str:
    """Runs a snippet, with the addresses in it replaced by the service's, and returns what it printed.

    Args:
        directory: an empty one, in which commands run.
    """
    text = re.sub(r"(127\.0\.0\.1|localhost):8000", service.http_url.removeprefix("http://"), snippet.text)
    text = re.sub(r"(127\.0\.0\.1|localhost):50051", service.grpc_target, text)
    if snippet.language == "python":
        return _run_python(text, str(snippet))
    if snippet.language == "js":
        return _run_command(["node", "--input-type=module", "--eval", text], directory)
    if snippet.language == "go":
        (directory / "main.go").write_text(text)
        return _run_command(["go", "run", "main.go"], directory)
    return _run_command(["bash", "-euo", "pipefail", "-c", text], directory)


def _run_python(text: str, name: str) -> str:
    """In this process: most of the time of a short program is its imports, which tests have already."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def _run_command(command: list[str], directory: Path) -> str:
    programs = directory / "bin"
    programs.mkdir()
    pagewire = programs / "pagewire"
    pagewire.write_text(f'#!/bin/sh\nexec {shlex.join(python_command("pagewire"))} "$@"\n')
    pagewire.chmod(0o755)
    environment = {**os.environ, **python_path(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def check_commands(text: str) -> int:
    """Checks a shell snippet without running it: pagewire's commands by their options, make's targets by a
    dry run. Returns how many were checked.

    Raises:
        Exception: of the command line's parser, naming the option.
        AssertionError: a command is neither, nor one that sets things up.
    """
    checked = 0
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | & ", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if not words or words[0] in _SETTING_UP:
                continue
            checked += 1
            if Path(words[0]).name == "pagewire":
                _parse(words[1:])
            else:
                assert words[0] == "make", f"{words[0]} is no command that can be checked without running it"
                subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    return checked


def _parse(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    name: str | None = "pagewire"
    context = None
    while hasattr(command, "commands"):
        context = command.make_context(name, list(words), parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, list(words), parent=context)


def options() -> set[str]:
    """Every option of every command."""

    def of(command: Any) -> set[str]:
        own = {text for param in command.params for text in (*param.opts, *param.secondary_opts)}
        return own.union(*map(of, getattr(command, "commands", {}).values()))

    return of(typer.main.get_command(app))
