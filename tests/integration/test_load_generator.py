"""The load generator against a server whose times and faults are known."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pagewire.base.errors import ConfigError, PagewireError, Unavailable
from pagewire.bench.serve.datasets import RandomDataset
from pagewire.bench.serve.generator import Generator, SpreadGenerator
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.metrics import Objectives
from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.serve.sweep import Sweep
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths
from pagewire.cli.main import app
from tests.integration.stream_server import Behaviour, StreamServer
from tools.service import free_ports

FIRST, GAP, TOKENS = 0.06, 0.02, 6


@pytest.fixture
def server() -> Iterator[StreamServer]:
    with StreamServer() as server:
        yield server


def dataset(output: int = TOKENS) -> RandomDataset:
    return RandomDataset(maker=PromptMaker(), input=Lengths(3, 9), output=Lengths(output, output))


def measure(
    url: str, *loads: Load, output: int = TOKENS, processes: int = 1, warmup: int = 0, **target: Any
) -> list[dict[str, Any]]:
    """The results of a sweep."""
    results: list[dict[str, Any]] = []
    sweep = Sweep(
        dataset=dataset(output), loads=loads, warmup=warmup, objectives=Objectives({}), save_requests=True
    )
    about = Target(url=url, **{"model": "m", **target})
    with SpreadGenerator(about, processes) if processes > 1 else Generator(about) as generator:
        assert not sweep.run(generator, results.append)
    return results


@pytest.mark.parametrize(("chat", "processes"), [(False, 1), (True, 1), (False, 2)])
def test_times_are_those_of_the_server(chat: bool, processes: int) -> None:
    with StreamServer(first=FIRST, gap=GAP) as server:
        load = Load(concurrency=4, num_requests=12)
        [result] = measure(server.url, load, processes=processes, chat=chat)
    assert result["requests"] == {"sent": 12, "complete": 12, "failed": 0, "unfinished": 0, "resent": 0}
    assert (result["output_tokens"], result["outputs"]) == (12 * TOKENS, 12 * TOKENS)
    assert (result["input_tokens"], result["wrong_output_length"]) == (12 * 5, 0)
    expected = {"ttft": FIRST, "itl": GAP, "tpot": GAP, "e2e": FIRST + (TOKENS - 1) * GAP}
    for measure_, seconds in expected.items():
        # a sleep is never shorter than told, and on a busy machine longer; the median has most of it
        assert 0.95 * seconds < result[f"{measure_}_ms"]["p50"] / 1000 < 2 * seconds + 0.03
    assert result["most_open"] == 4
    assert 3 * expected["e2e"] < result["seconds"]
    assert [row["index"] for row in result["per_request"]] == list(range(12))
    assert result["client"]["processes"] == processes


def test_a_closed_loop_keeps_its_connections(server: StreamServer) -> None:
    measure(server.url, Load(concurrency=3, num_requests=30))
    assert len(server.requests) == 30
    assert server.num_connections == 3


def test_points_of_a_sweep_ask_for_the_same_lengths_and_other_contents(server: StreamServer) -> None:
    loads = (Load(rate=500, num_requests=8), Load(num_requests=8))
    measure(server.url, *loads, warmup=2)
    assert len(server.requests) == 18
    prompts = [request["prompt"] for request in server.requests]
    assert len(set(map(str, prompts))) == 18
    assert sorted(map(len, prompts[2:10])) == sorted(map(len, prompts[10:]))


def test_arrivals_at_a_rate_are_spread_over_processes_and_none_is_sent_twice(server: StreamServer) -> None:
    load = Load(rate=100, num_requests=40, concurrency=8)
    [result] = measure(server.url, load, processes=2)
    assert len({str(request["prompt"]) for request in server.requests}) == len(server.requests) == 40
    assert [row["index"] for row in result["per_request"]] == list(range(40))
    assert result["most_open"] <= 8
    due = list(load.offsets())[-1]
    assert due - 0.1 < result["seconds"] < due + 2  # the first may be sent late


def test_a_duration_ends_a_closed_loop_and_waits_for_what_is_open() -> None:
    with StreamServer(first=0.1) as server:
        [result] = measure(server.url, Load(concurrency=2, duration=0.35), output=1)
    assert result["requests"]["complete"] == len(server.requests)
    assert 4 <= len(server.requests) <= 8
    assert 0.35 < result["seconds"] < 1


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("refuse", "HTTP 429: the queue is full"),
        ("no stream", "HTTP 200, but not a stream of events"),
        ("break off", "connection lost: the connection was closed in the middle of the answer"),
        ("hang", "timeout: no end after 0.3 s"),
    ],
)
def test_failures_are_told_by_kind(server: StreamServer, behaviour: Behaviour, error: str) -> None:
    server.behaviour = behaviour
    [result] = measure(server.url, Load(concurrency=2, num_requests=6), timeout=0.3)
    assert result["errors"] == {error: 6}
    assert (result["requests"]["failed"], result["requests_per_s"], result["ttft_ms"]) == (6, 0, None)
    assert {row["error"] for row in result["per_request"]} == {error}


@pytest.mark.parametrize("load", [Load(num_requests=20), Load(rate=1000, num_requests=20)])
def test_a_server_that_slams_its_door_lets_nothing_wait(server: StreamServer, load: Load) -> None:
    server.behaviour = "slam"
    [result] = measure(server.url, load)
    assert result["requests"]["failed"] == 20
    assert all(error.startswith("connection lost: ") for error in result["errors"])
    assert result["seconds"] < 10


def test_a_server_that_closes_connections_it_has_kept_is_asked_again(server: StreamServer) -> None:
    server.behaviour = "leave"
    [result] = measure(server.url, Load(concurrency=1, num_requests=5))
    assert result["requests"]["complete"] == 5
    assert len(server.requests) == 5


def test_tokens_are_counted_here_where_the_server_does_not(server: StreamServer) -> None:
    server.behaviour = "no usage"
    [result] = measure(server.url, Load(num_requests=3))
    assert result["output_tokens"] == 3 * TOKENS
    assert result["output_tokens_counted_by"] == "pieces of output"
    assert result["input_tokens"] == sum(len(request["prompt"]) for request in server.requests)


def test_a_server_that_is_not_there(server: StreamServer) -> None:
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    for processes in (1, 2):
        with pytest.raises(Unavailable, match=f"{url}: .*refused"):
            measure(url, Load(num_requests=1), processes=processes)
    with pytest.raises(Unavailable, match="cannot connect"), Generator(Target(url=url)) as generator:
        generator.first_model()
    with pytest.raises(Unavailable, match=r"cannot connect: (?i:.*http)"):
        with Generator(Target(url=f"grpc://127.0.0.1:{server.port}")) as generator:
            generator.first_model()


def test_a_warm_up_that_fails_ends_the_measurement(server: StreamServer) -> None:
    server.behaviour = "refuse"
    with pytest.raises(PagewireError, match="no request of the warm-up: HTTP 429: the queue is full"):
        measure(server.url, Load(num_requests=4), warmup=2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
    ]
    files = ["-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    subprocess.run([*command, "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def test_tls_is_verified_unless_told_otherwise(certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with StreamServer(tls=context) as server:
        for trust in ({"ca_file": certificate}, {"insecure": True}):
            [result] = measure(server.url, Load(num_requests=3), **trust)
            assert result["requests"]["complete"] == 3
        with pytest.raises(Unavailable, match="certificate"):
            measure(server.url, Load(num_requests=3))
    with pytest.raises(ConfigError, match="no certificates can be read"):
        measure(server.url, Load(num_requests=3), ca_file=certificate.with_name("missing"))


def bench(*arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own, to be interrupted."""
    command = [sys.executable, "-m", "pagewire", "bench", "serve", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def bench_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The command in this process, which is cheaper to start."""
    monkeypatch.setattr(sys, "argv", ["pagewire", "bench", "serve", *arguments])  # for the record
    return CliRunner().invoke(app, sys.argv[1:])


def test_the_command_sends_what_it_is_told_and_keeps_no_keys(
    server: StreamServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, picture = tmp_path / "out" / "serve.json", tmp_path / "serve.svg"
    body = '{"top_p": 0.5, "stream_options": null}'
    options = ("--chat", "--num-requests", "6", "--input-len", "4", "--output-len", "3", "--rate", "50,inf")
    secret = ("--api-key", "s3cret", "--header", "X-Team: hush-hush")
    written = ("--json", str(path), "--picture", str(picture), "--save-requests")
    further = ("--extra-body", body, "--slo", "ttft=5000")
    run = bench_here(monkeypatch, "--url", f"{server.url}/v1", *options, *secret, *written, *further)
    assert run.exit_code == 0, run.output
    assert len(server.requests) == 13  # with one to warm up
    request, headers = server.requests[0], server.headers[0]
    assert (request["model"], request["max_tokens"], request["top_p"]) == ("first", 3, 0.5)
    assert "stream_options" not in request
    assert len(request["messages"][0]["content"].split()) == 4
    assert (headers["authorization"], headers["x-team"]) == ("Bearer s3cret", "hush-hush")
    record = json.loads(path.read_text())
    assert [result["load"]["text"] for result in record["results"]] == ["50 per second", "all at once"]
    assert record["results"][0]["goodput"]["good"] == 6
    assert len(record["results"][0]["per_request"]) == 6
    assert record["target"]["headers"] == ["authorization", "X-Team"]
    assert "cret" not in path.read_text()
    assert "hush" not in path.read_text()
    assert "output tokens/s" in picture.read_text()
    assert run.stdout.splitlines()[-3].split()[:4] == ["LOAD", "REQ/S", "OUT", "TOK/S"]
    assert "6 of 6 requests complete" in run.stdout


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_prints_what_is_known(tmp_path: Path, processes: str) -> None:
    path = tmp_path / "serve.json"
    with StreamServer(gap=0.05) as server:
        options = ("--model", "m", "--warmup", "0", "--concurrency", "4", "--processes", processes)
        lengths = ("--duration", "60", "--output-len", "5:1000", "--json", str(path))
        run = bench("--url", server.url, *options, *lengths)
        deadline = time.monotonic() + 30
        while len(server.requests) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=30)
    assert run.returncode == 130, errors
    assert "unfinished" in output
    [result] = json.loads(path.read_text())["results"]
    assert result["interrupted"]
    assert result["requests"]["unfinished"] == 4
    assert result["requests"]["sent"] == len(server.requests)
    assert "Traceback" not in errors


def test_a_run_in_which_nothing_succeeds_has_status_1(
    server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behaviour = "refuse"
    run = bench_here(monkeypatch, "--url", server.url, "--num-requests", "3", "--warmup", "0")
    assert run.exit_code == 1
    assert "error, 3 times: HTTP 429: the queue is full" in run.output
