"""The pages in docs/ do what they say. Their snippets are run against a service with the null engine: what matters is
that the commands and programs are taken, not what a model would say. (Those of which that matters are in test_readme.py.)"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import test_readme
from tests.e2e.snippets import ROOT, Snippet, check_commands, missing_program, options, run, snippets
from tools.service import Service

PAGES = sorted(page for page in (ROOT / "docs").glob("**/*.md"))
FOUND = [
    snippet
    for page in PAGES
    if str(page.relative_to(ROOT)) not in test_readme.PAGES
    for snippet in snippets(page)
]
NOT_RUN = {"needs Claude Code": 1}
"""How many snippets no test runs, by the reason in their mark."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """The null engine never ends an answer by itself: a short context does."""
    options = ("--engine", "null", "--max-model-len", "512")
    with Service(tmp_path_factory.mktemp("docs"), options=options) as service:
        yield service


def of(*actions: str) -> pytest.MarkDecorator:
    """The snippets of which these are the actions, as a test's parameters."""
    return pytest.mark.parametrize("snippet", [each for each in FOUND if each.action in actions], ids=str)


@of("run", "prints", "needs")
def test_snippet(snippet: Snippet, service: Service, tmp_path: Path) -> None:
    program = missing_program(snippet)
    if program is not None:
        pytest.skip(f"{program} is not installed")
    output = run(snippet, service, tmp_path)
    if snippet.action == "prints":
        assert snippet.detail in output


@of("parsed")
def test_commands_and_their_options_exist(snippet: Snippet) -> None:
    assert check_commands(snippet.text) > 0


@of("tested")
def test_other_tests_of_snippets_exist(snippet: Snippet) -> None:
    assert (ROOT / snippet.detail).is_file()


def test_every_other_snippet_is_counted() -> None:
    known = ("run", "prints", "needs", "parsed", "tested", "not")
    assert [str(each) for each in FOUND if each.action not in known] == []
    assert Counter(each.detail for each in FOUND if each.action == "not") == NOT_RUN


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=lambda page: page.stem)
def test_options_that_guides_offer_exist(page: Path) -> None:
    """In tables whose second column is pagewire's, every option of that column is one."""
    rows = [line.split("|")[2] for line in page.read_text().splitlines() if line.startswith("| ")]
    offered = {option for row in rows for option in re.findall(r"`(--[a-z][a-z-]+)", row)}
    assert offered
    assert offered <= options()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|tools|engine|frontend|scheduler|pagewire|protos)/[\w/.-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
