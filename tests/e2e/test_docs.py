"""The pages in docs/ do what they say. Their snippets are run against a service with the null engine: what
matters is that the commands and programs are taken. (Where the model's words matter: test_readme.py.)"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
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
NOT_RUN = {
    "needs Claude Code": 1,
    "it builds an image, which fetches packages": 1,
    "it needs a cluster": 1,
}
"""How many snippets no test runs, by the reason in their mark."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Service]:
    """The null engine never ends an answer by itself: a short context does."""
    options = ("--engine", "null", "--max-model-len", "512", "--reasoning-parser", "qwen3")
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
def test_commands_and_their_options_exist(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w-]+\.jsonl", snippet.text):
        Path(name).touch()  # a reader's own file
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
    named = re.findall(
        r"`((?:tests|tools|engine|frontend|scheduler|pagewire|protos)/[\w/.-]+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its rule."""
    text = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "
    ]
    return [rows[0], *(row for row in rows[1:] if len(row) == len(rows[0]) and row[0] != "---")]


def test_metrics_are_those_that_a_service_prints(service: Service) -> None:
    page = (ROOT / "docs" / "operations" / "metrics.md").read_text()
    listed = {
        name
        for line in page.splitlines()
        if line.startswith(("| `pagewire:", "| `nv_"))
        for name in re.findall(r"`([\w:]+)`", line.split("|")[1])
    }
    printed = re.findall(r"^# TYPE (\S+) ", httpx.get(f"{service.http_url}/metrics").text, re.MULTILINE)
    ours = {name for name in printed if not name.endswith("_created") and not name.startswith("vllm:")}
    assert listed == ours


FIELDS: dict[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "n, best_of": {"n": 2, "best_of": 3},
    "beams": {"use_beam_search": True, "n": 2},
    "log probabilities": {"logprobs": True, "top_logprobs": 2},
    "of the prompt": {"prompt_logprobs": 1},
    "form": {"response_format": {"type": "json_object"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]},
    "thoughts": {"include_reasoning": True, "chat_template_kwargs": {"enable_thinking": True}},
    "stop strings": {"stop": ["stop"]},
}


def test_features_work_together_or_are_refused_as_the_matrix_says(service: Service) -> None:
    (_, *names), *rows = table("features.md", "Together")
    assert names == list(FIELDS)
    found = {}
    with httpx.Client(base_url=service.http_url, timeout=60) as client:
        for row, cells in zip(names, rows, strict=True):
            for column, cell in zip(names, cells[1:], strict=True):
                asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
                answer = client.post("/v1/chat/completions", json={**asked, **FIELDS[column], **FIELDS[row]})
                wanted = {"yes": 200, "no": 400, "": 200}[cell.rstrip("¹²³⁴")]
                if answer.status_code != wanted:
                    found[row, column] = (cell, answer.text[:200])
    assert found == {}


@pytest.mark.parametrize(("other", "words"), [("beams", "unset with beam search"), ("form", "which decides")])
def test_a_call_that_must_be_made_is_refused_as_the_notes_say(
    service: Service, other: str, words: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "required"}
    fields = {**asked, **FIELDS["tools"], **FIELDS[other]}
    answer = httpx.post(f"{service.http_url}/v1/chat/completions", json=fields, timeout=60)
    assert answer.status_code == 400
    assert words in answer.text


@pytest.mark.parametrize("row", table("features.md", "What is refused")[1:], ids=lambda row: row[0][:40])
def test_refusals_have_the_words_that_the_page_has(row: list[str]) -> None:
    words, path = (cell.strip("`") for cell in row[1:])
    source = re.sub(r"[\"']\s+f?[\"']", "", (ROOT / path).read_text())  # texts in several parts
    assert words in source


def test_every_kernel_has_its_row() -> None:
    folders = {path.parent.name for path in (ROOT / "engine" / "kernels").glob("*/naive.py")}
    assert {row[0].strip("`") for row in table_of_kernels()} == folders


def table_of_kernels() -> list[list[str]]:
    """The rows of the page's first table."""
    text = (ROOT / "docs" / "kernels.md").read_text().partition("| --- ")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[1:]]
