"""pagewire batch and pagewire infer over files, against real services, killed while they run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pagewire.cli.main import main
from tools.service import Service

BODIES: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 40}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 40}),
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pagewire", *map(str, arguments)]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, which saves its start; returns status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pagewire", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def requests(count: int) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}
        for number in range(count)
        for url, body in [BODIES[number % len(BODIES)]]
    ]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(arguments: Sequence[object], path: Path, lines: int) -> None:
    """Starts a command and kills it once the output has so many lines."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while num_lines(path) < lines:
        assert process.poll() is None, f"it ended by itself, with {num_lines(path)} lines"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()


def check_every_line_once(path: Path, count: int) -> None:
    answers = read(path)
    assert Counter(answer["custom_id"] for answer in answers) == Counter(f"r{n}" for n in range(count))
    assert {answer["response"]["status_code"] for answer in answers} == {200}


def test_a_batch_killed_while_it_runs_answers_every_line_once(
    null_service: Service, tmp_path: Path, run: Run
) -> None:
    source, results = write(tmp_path / "in.jsonl", requests(60)), tmp_path / "out.jsonl"
    arguments = ("batch", source, results, "--url", null_service.http_url, "--concurrency", 2)
    kill_after(arguments, results, 10)
    with results.open("ab") as file:
        file.write(b'{"id": "batch_req_0000')  # as if it had been killed in the middle of a line
    before = num_lines(results)
    status, said, _ = run(*arguments)
    assert status == 0
    assert f"60 of 60 lines answered in {results}, {before} of them before" in said
    check_every_line_once(results, 60)


@pytest.mark.slow
def test_a_thousand_lines_of_an_engine_of_its_own_killed_three_times(tmp_path: Path, run: Run) -> None:
    source, results = write(tmp_path / "in.jsonl", requests(1000)), tmp_path / "out.jsonl"
    arguments = ("batch", source, results, "--engine", "null", "--concurrency", 4)
    for lines in (100, 350, 700):
        kill_after(arguments, results, lines)
    status, said, _ = run(*arguments)
    assert status == 0
    assert "1,000 of 1,000 lines answered" in said
    check_every_line_once(results, 1000)


def test_bad_lines_have_an_error_each_and_the_status_says_so(
    null_service: Service, tmp_path: Path, run: Run
) -> None:
    source = write(tmp_path / "in.jsonl", requests(1))
    with source.open("a") as file:
        file.write('{"custom_id": "torn\n')
        body = {"prompt": "x", "max_tokens": -1}
        file.write(json.dumps({"custom_id": "b", "url": "/v1/completions", "body": body}))
    results = tmp_path / "out.jsonl"
    status, said, _ = run("batch", source, results, "--url", null_service.http_url)
    assert (status, said.startswith("3 of 3 lines answered"), "2 with errors" in said) == (1, True, True)
    by_name = {answer["custom_id"]: answer for answer in read(results)}
    assert by_name["r0"]["response"]["body"]["usage"]["completion_tokens"] == 40
    assert by_name["r0"]["response"]["request_id"]
    assert "line 2 is not JSON" in by_name[None]["error"]["message"]
    assert by_name["b"]["response"]["status_code"] == 400
    assert by_name["b"]["response"]["body"]["error"]["param"] == "max_tokens"

    write(source, [{**request, "custom_id": "other"} for request in requests(1)])
    status, _, error = run("batch", source, results, "--url", null_service.http_url)
    assert status == 2
    assert error.startswith("pagewire: the results have 3 answers to lines that")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:50051", "url is 'localhost:50051'; a batch is sent over HTTP: give an address such as"),
        ("http://127.0.0.1:1", "no server answers at http://127.0.0.1:1"),
    ],
)
def test_an_address_that_cannot_be_is_one_plain_line(tmp_path: Path, run: Run, url: str, said: str) -> None:
    source = write(tmp_path / "in.jsonl", requests(1))
    status, output, error = run("batch", source, tmp_path / "out.jsonl", "--url", url)
    assert (status, output) == (2, "")
    assert error.splitlines()[-1].startswith(f"pagewire: {said}")
    assert "Traceback" not in error


DATA = [
    {"query": "Name the capital of France.", "response": "The capital of France is Paris."},
    {
        "query": "And of Italy?",
        "history": [["What is the capital of Spain?", "Madrid."]],
        "system": "Short.",
    },
    {"nonsense": True},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
]


def test_a_data_set_has_its_results_in_order_and_goes_on_where_it_was(
    null_service: Service, tmp_path: Path, run: Run
) -> None:
    source, results = write(tmp_path / "in.jsonl", DATA * 12), tmp_path / "out.jsonl"
    place = ("--dataset", source, "--result-path", results, "--url", null_service.grpc_target)
    arguments = ("infer", null_service.model, *place, "--max-tokens", 30, "--concurrency", 2)
    kill_after(arguments, results, 5)
    status, said, _ = run(*arguments, "--metric", "rouge")
    assert status == 1
    first, second = said.splitlines()
    assert first.startswith(f"48 of 48 lines in {results}, ")
    assert ", 12 with errors" in first
    assert second.startswith("rouge-1 ")
    assert second.endswith(" over 24 lines")
    for sample, result in zip(DATA * 12, read(results), strict=True):
        if "nonsense" in sample:
            assert (result["response"], result["error"].split()[0]) == (None, "line")
        else:
            assert result["response"].count(" ") > 10
            assert result["labels"] == sample.get("response", "4" if "messages" in sample else None)
        if "query" in sample:
            assert result["query"] == sample["query"]
            assert result["history"] == sample.get("history", [])


@pytest.mark.slow
def test_perplexity_is_that_of_the_models_own_log_probabilities(
    server: Service, tmp_path: Path, run: Run
) -> None:
    text = "The capital of France is Paris."
    source = write(tmp_path / "in.jsonl", [*DATA, {"text": text}])
    results = tmp_path / "out.jsonl"
    place = ("--dataset", source, "--result-path", results, "--url", server.grpc_target)
    status, said, _ = run("infer", server.model, *place, "--metric", "ppl")
    assert status == 1
    paris, no_response, nonsense, four, plain = read(results)
    assert said.splitlines()[1].endswith("over 3 lines")
    assert "has no response to score" in no_response["error"]
    assert "is no request" in nonsense["error"]
    assert 1 < paris["perplexity"] < plain["perplexity"] < four["perplexity"]
    assert (paris["num_tokens"], plain["num_tokens"], four["num_tokens"]) == (7, 6, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--metric", "acc"), "--result-path and --metric are for a data set: give --dataset IN.jsonl, too"),
        (("--dataset", "IN"), "--dataset needs a place for its results: give --result-path OUT.jsonl, too"),
        (
            ("--dataset", "IN", "--result-path", "OUT", "--metric", "acc"),
            "--metric acc needs answers to compare with",
        ),
        (("--dataset", "IN", "--result-path", "IN"), "is the data set; name another file for the results"),
    ],
)
def test_infer_says_what_to_type_instead(tmp_path: Path, run: Run, options: Any, said: str) -> None:
    source = write(tmp_path / "in.jsonl", [{"query": "Hi"}])
    places = {"IN": str(source), "OUT": str(tmp_path / "out.jsonl")}
    status, _, error = run("infer", "smollm2-135m", *(places.get(option, option) for option in options))
    assert status == 2
    assert said in error


def test_infer_without_a_data_set_is_a_conversation(
    null_service: Service, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\n"))
    place = ("--url", null_service.grpc_target)
    status, said, _ = run("infer", null_service.model, *place, "--max-tokens", 5)
    assert status == 0
    assert len(said.split()) >= 3
