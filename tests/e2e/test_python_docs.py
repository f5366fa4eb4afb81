"""docs/python.md and docs/batch.md do what they say: every example is run as it stands, against one shared
service and one engine, of which no tokens are looked at."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagewire
from pagewire import LLM
from pagewire.cli.main import main
from tools.service import Service

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> Iterator[LLM]:
    with LLM(engine="null") as llm:
        yield llm


class Borrowed:
    """Stands for `LLM` in examples, so that one engine is enough: it opens nothing and closes nothing."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def __call__(self, model: str) -> Borrowed:
        assert model == "smollm2-135m"
        return self

    def __enter__(self) -> LLM:
        return self._llm

    def __exit__(self, *_: object) -> None:
        """Closes nothing."""


@pytest.mark.parametrize("number", range(len(blocks("python.md", "python"))))
def test_a_python_example_runs(
    null_service: Service,
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    example = blocks("python.md", "python")[number]
    port = null_service.http_url.rpartition(":")[2]
    for address, actual in (
        ("localhost:50051", null_service.grpc_target),
        ("port=8000", f"port={port}"),
        ("get_model_list_client()", f"get_model_list_client(port={port})"),
        ("request_config=request_config)", f"request_config=request_config, port={port})"),
    ):
        example = example.replace(address, actual)
    monkeypatch.setitem(vars(pagewire), "LLM", Borrowed(llm))
    exec(compile(example, f"example {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["batch", "infer"])
def test_a_command_over_a_file_runs(
    null_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in zip(("requests.jsonl", "data.jsonl"), blocks("batch.md", "jsonl"), strict=True):
        (tmp_path / file).write_text(content)
    [example] = [block for block in blocks("batch.md", "sh") if block.startswith(f"pagewire {name} ")]
    url = null_service.http_url if name == "batch" else null_service.grpc_target
    monkeypatch.setattr(sys, "argv", [*example.split(), "--url", url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (1 if name == "batch" else 0)  # the batch has a line that is wrong
    [results] = [file for file in ("answers.jsonl", "results.jsonl") if (tmp_path / file).exists()]
    assert len((tmp_path / results).read_text().splitlines()) == (4 if name == "batch" else 3)
