"""What the command line of `pagewire bench serve` asks for, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.sweep import Sweep
from pagewire.bench.serve.target import Target
from pagewire.cli import bench_serve
from pagewire.cli.main import app

URL = ("--url", "http://127.0.0.1:9")


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Target, Sweep]:
    """What the command would measure."""
    measured: list[Any] = []
    monkeypatch.setattr(bench_serve, "_run", lambda *values: measured.extend(values))
    result = CliRunner().invoke(app, ["bench", "serve", *URL, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return measured[0], measured[1]


@pytest.mark.parametrize(
    ("arguments", "loads", "dataset"),
    [
        ((), ["all at once"], "512/128"),
        (("--workload", "burst"), ["all at once"], "256/256"),
        (("--workload", "closed64"), ["64 at a time"], "512/128"),
        (("--workload", "rate8"), ["8 per second"], "512/256"),
        (
            ("--workload", "rate8", "--rate", "1,2", "--output-len", "9"),
            ["1 per second", "2 per second"],
            "512/9",
        ),
        (("--concurrency", "1,64"), ["1 at a time", "64 at a time"], "512/128"),
        (("--rate", "inf", "--concurrency", "5"), ["5 at a time"], "512/128"),
        (("--dataset", "sharegpt-like"), ["all at once"], "lengths like ShareGPT's"),
        (
            ("--dataset", "prefix", "--num-prefixes", "4", "--prefix-len", "99", "--input-len", "1:2"),
            ["all at once"],
            "(4 prefixes of 99 + 1:2)/128",
        ),
    ],
)
def test_loads_and_datasets(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], loads: list[str], dataset: str
) -> None:
    _, sweep = asked(monkeypatch, *arguments)
    assert [str(load) for load in sweep.loads] == loads
    assert str(sweep.dataset) == dataset


def test_presets_are_the_measured_tables_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"burst": 512, "closed64": 256, "rate8": 256}
    for name, number in numbers.items():
        [load] = asked(monkeypatch, "--workload", name)[1].loads
        assert load.num_requests == number
    [load] = asked(monkeypatch, "--workload", "rate8", "--duration", "5")[1].loads
    assert (load.num_requests, load.duration) == (None, 5)


def test_contents_differ_between_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (asked(monkeypatch, "--seed", "7")[1].dataset.ask("run", 0) for _ in range(2))
    assert first.prompt_len == second.prompt_len
    assert first.prompt != second.prompt


def test_a_trace_comes_at_its_own_times_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"timestamp": 1, "input_length": 5, "output_length": 2}))
    arguments = ("--dataset", "trace", "--dataset-path", str(path))
    _, sweep = asked(monkeypatch, *arguments, "--speed", "4")
    assert (sweep.uses_trace, sweep.loads[0].num_requests) == (True, 1)
    assert not asked(monkeypatch, *arguments, "--rate", "3")[1].uses_trace


def test_conversations_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    target, sweep = asked(monkeypatch, "--chat", "--temperature", "0.5", "--no-ignore-eos")
    ask = sweep.dataset.ask("run", 0)
    assert isinstance(ask.prompt, str)
    body = json.loads(target.body(ask.prompt, 3))
    assert body["messages"] == [{"role": "user", "content": ask.prompt}]
    assert (body["temperature"], "ignore_eos" in body, "prompt" in body) == (0.5, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "127.0.0.1:80"), "url is '127.0.0.1:80'; it must be http://HOST:PORT"),
        (("--url", "http://h:99999"), "url is"),
        (("--url", "grpc://h", "--chat"), "chat is for HTTP"),
        (("--url", "grpc://h", "--extra-body", "{}", "--extra-body", '{"a": 1}'), "extra_body is for HTTP"),
        (("--workload", "W1"), "workload is 'W1'; it must be one of burst, closed64, rate8"),
        (("--workload", "burst", "--dataset", "prefix"), "leave --dataset out"),
        (("--dataset", "wild"), "dataset is 'wild'; it must be one of random, sharegpt-like"),
        (("--dataset", "trace"), "--dataset-path belongs to"),
        (("--dataset-path", "x"), "--dataset-path belongs to"),
        (("--prefix-len", "5"), "belong to --dataset prefix"),
        (("--rate", "1,x"), "rate is '1,x'; it must be numbers above 0, or inf"),
        (("--rate", "nan"), "rate is 'nan'"),
        (("--concurrency", "1.5"), "concurrency is '1.5'; it must be whole numbers above 0"),
        (("--concurrency", "1,2", "--rate", "1,2"), "are both lists"),
        (("--duration", "5"), "nothing says when to stop"),
        (("--rate", "2", "--burstiness", "0"), "burstiness is 0"),
        (("--input-len", "0"), "input-len is '0'"),
        (("--speed", "0"), "speed is 0"),
        (("--speed", "2"), "--speed belongs to --dataset trace"),
        (("--dataset", "sharegpt-like", "--input-len", "5"), "sharegpt-like has lengths of its own"),
        (("--concurrency", "2", "--burstiness", "2"), "--burstiness belongs to a --rate"),
        (("--save-requests",), "--save-requests belongs to --json"),
        (("--insecure",), "this url has no TLS"),
        (("--slo", "fast"), "slo is 'fast'"),
        (("--header", "nothing"), "header is 'nothing'; it must be 'NAME: VALUE'"),
        (("--header", "a: b\nc: d"), "header is"),
        (("--extra-body", "[1]"), "extra_body is '[1]'; it must be a JSON object"),
        (("--tokenizer", "no-such-model"), "tokenizer is 'no-such-model'; it must be"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        CliRunner().invoke(app, ["bench", "serve", *URL, *arguments], catch_exceptions=False)
    assert message in raised.value.message


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:1", "/v1/models"),
        ("http://h:1/", "/v1/models"),
        ("https://h/v1", "/v1/models"),
        ("https://h/api/v1/", "/api/v1/models"),
        ("https://h/openai", "/openai/v1/models"),
    ],
)
def test_a_url_with_or_without_the_apis_path(url: str, path: str) -> None:
    assert Target(url=url).path("models") == path


def test_ports_and_names_of_hosts() -> None:
    assert Target(url="https://h").authority == "h:443"
    assert Target(url="grpc://[::1]:5").authority == "[::1]:5"
