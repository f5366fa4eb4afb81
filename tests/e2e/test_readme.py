"""The README and the pages on which it matters what a model says do what they say: their snippets are run as
they stand, against a real service of the default model. The other pages' are in test_docs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.snippets import ROOT, Snippet, check_commands, missing_program, run, snippets
from tools.service import Service

PAGES = ("README.md", "docs/index.md", "docs/quick-start.md", "docs/clients.md", "docs/chat.md")
FOUND = [snippet for page in PAGES for snippet in snippets(ROOT / page)]


@pytest.mark.parametrize("snippet", [each for each in FOUND if each.action != "parsed"], ids=str)
def test_snippet(snippet: Snippet, server: Service, tmp_path: Path) -> None:
    program = missing_program(snippet)
    if program is not None:
        pytest.skip(f"{program} is not installed")
    output = run(snippet, server, tmp_path)
    assert output.strip()
    if snippet.action == "prints":
        assert snippet.detail in output


@pytest.mark.parametrize("snippet", [each for each in FOUND if each.action == "parsed"], ids=str)
def test_commands_that_install_and_serve_exist(snippet: Snippet) -> None:
    assert check_commands(snippet.text) > 0


def test_all_of_them_are_found() -> None:
    assert [sum(each.page == page for each in FOUND) for page in PAGES] == [3, 1, 8, 8, 1]
