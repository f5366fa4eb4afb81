"""`LLM.stream`, `infer` and `embed`, what an LLM leaves behind, and every example of docs/python.md and
docs/batch.md, run as it stands against one service and one engine. The tokens may be any."""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

import pagewire
from pagewire import LLM, SamplingParams
from pagewire.base.errors import InvalidRequest
from pagewire.cli.main import main
from pagewire.wire.sampling_params import BeamSearch
from scheduler.request import Request
from tools.service import Service

PROMPTS = ["Once upon a time", "The capital of France is", "One, two,"]
SAMPLING = SamplingParams(max_tokens=12, seed=3)
LONG = SamplingParams(max_tokens=1000, seed=3)
DOCS = Path(__file__).resolve().parents[2] / "docs"
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> Iterator[LLM]:
    with LLM(engine="null") as llm:
        yield llm


def test_an_llm_frees_everything_and_the_program_may_open_another(smollm2_dir: Path) -> None:
    def held() -> tuple[set[int], set[str], int]:
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        return children, {thread.name for thread in threading.enumerate()}, psutil.Process().num_fds()

    states = []
    for _ in range(2):
        with LLM(engine="null") as llm:
            pieces = llm.stream(messages=QUESTION, sampling_params=LONG)
            next(pieces)
        with pytest.raises(InvalidRequest, match="closed"):
            for _ in pieces:
                pass
        states.append(held())
    assert states[0] == states[1]
    assert not any("template_process" in child.cmdline()[-1] for child in psutil.Process().children())
    with pytest.raises(InvalidRequest, match="closed"):
        llm.embed("x", pooling="last")


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        SamplingParams(max_tokens=12, seed=3, n=3),
        SamplingParams(max_tokens=12, seed=3, n=2, best_of=3),
        SamplingParams(max_tokens=5, n=2, beam_search=BeamSearch(width=2)),
    ],
    ids=["one", "several", "best", "beams"],
)
def test_pieces_together_are_what_generate_returns(llm: LLM, sampling: SamplingParams) -> None:
    whole = llm.generate(PROMPTS, sampling)
    texts = [[""] * sampling.n for _ in PROMPTS]
    ids: list[list[list[int]]] = [[[] for _ in range(sampling.n)] for _ in PROMPTS]
    finished, outputs = [], {}
    for piece in llm.stream(PROMPTS, sampling):
        texts[piece.prompt_index][piece.index] += piece.text
        ids[piece.prompt_index][piece.index] += piece.token_ids
        if piece.finish_reason is not None:
            finished.append((piece.prompt_index, piece.index))
        if piece.output is not None:
            outputs[piece.prompt_index] = piece.output
    assert texts == [[each.text for each in output.outputs] for output in whole]
    assert ids == [[each.token_ids for each in output.outputs] for output in whole]
    assert sorted(finished) == [(prompt, index) for prompt in range(3) for index in range(sampling.n)]
    assert [outputs[place].outputs for place in range(3)] == [output.outputs for output in whole]


def test_an_llm_keeps_no_request_that_has_ended(llm: LLM) -> None:
    def requests() -> list[Request]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is Request]

    before = requests()
    llm.generate(PROMPTS, SAMPLING)
    kept = len(requests()) - len(before)
    assert kept <= 0, "a program that asks for days would hold every prompt it ever asked"


def test_all_prompts_come_at_once(llm: LLM) -> None:
    places = [piece.prompt_index for piece in llm.stream(PROMPTS, SAMPLING)]
    assert places[:6] == [0, 1, 2, 0, 1, 2]


def test_a_stop_string_never_comes_and_ends_its_own_prompt_alone(llm: LLM) -> None:
    [whole] = llm.generate(PROMPTS[0], SAMPLING)
    word = whole.outputs[0].text.split()[5]
    stopping = SamplingParams(max_tokens=12, seed=3, stop=[word])
    texts, reasons = ["", ""], ["", ""]
    for piece in llm.stream([PROMPTS[0]] * 2, [stopping, SAMPLING]):
        texts[piece.prompt_index] += piece.text
        reasons[piece.prompt_index] = piece.finish_reason or ""
    assert texts == [whole.outputs[0].text.partition(word)[0], whole.outputs[0].text]
    assert reasons == ["stop", "length"]


def test_a_stream_that_is_closed_ends_its_requests_and_frees_the_llm(llm: LLM) -> None:
    with closing(llm.stream(messages=[QUESTION, QUESTION], sampling_params=LONG)) as pieces:
        assert next(pieces).token_ids
        with pytest.raises(InvalidRequest, match="has a stream open"):
            llm.generate("x", SAMPLING)
    assert llm._engine is not None
    assert not llm._engine.core.running
    assert len(llm.generate("x", SAMPLING)[0].outputs[0].token_ids) == 12


def test_what_is_wrong_is_said_before_anything_is_read(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="give either prompts or messages"):
        llm.stream()
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        llm.stream(["x", ""], SAMPLING)
    with pytest.raises(InvalidRequest, match=r"request_list\[1\] has no query"):
        llm.infer([{"query": "x"}, {"history": []}], SAMPLING)  # type: ignore[typeddict-item]
    with pytest.raises(InvalidRequest, match="history is not a list"):
        llm.infer([{"query": "x", "history": [["x"]]}], SAMPLING)


def test_infer_takes_history_and_gives_it_back_with_the_new_turn(llm: LLM) -> None:
    requests = [
        {"query": "Hi"},
        {"query": "And?", "history": [("Hi", "Hello.")], "system": "Short."},
    ]
    turns = [
        QUESTION,
        [
            {"role": "system", "content": "Short."},
            *QUESTION,
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And?"},
        ],
    ]
    expected = [output.outputs[0].text for output in llm.chat(turns, SAMPLING)]
    answers = llm.infer(requests, SAMPLING)
    assert [answer["response"] for answer in answers] == expected
    assert answers[0]["history"] == [["Hi", expected[0]]]
    assert answers[1]["history"] == [["Hi", "Hello."], ["And?", expected[1]]]
    first, *_, last = llm.infer(requests, SAMPLING, stream=True)
    assert last == answers
    assert all(
        whole["response"].startswith(part["response"]) for whole, part in zip(answers, first, strict=True)
    )


def test_embed_gives_an_array_in_the_order_of_the_texts(llm: LLM) -> None:
    vectors = llm.embed(["one", [1, 2, 3], "three"], pooling="mean")  # type: ignore[list-item]
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 576))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert llm.embed("one", pooling="last", dimensions=7, normalize=False).shape == (1, 7)
    with pytest.raises(InvalidRequest, match="not made for embeddings; ask for a pooling"):
        llm.embed("one")
    with pytest.raises(InvalidRequest, match="dimensions is 577; this model's vectors have 576"):
        llm.embed("one", pooling="last", dimensions=577)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


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
