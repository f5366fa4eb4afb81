"""Two replicas of a real model give one worker's answers, also when one of them is killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.test_replicas import command, until_healthy
from tools.chaos.processes import living
from tools.service import Service

OPTIONS = ("-dp", "2", "--device", "cpu", "--dtype", "float32", "--kv-cache-memory", str(1 << 28))
PROMPT = "The capital of France is"
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 7},
    "log probabilities": {"temperature": 0, "logprobs": 3},
    "a form": {"temperature": 0, "guided_regex": "[a-z ]{24,40}"},
    "samples": {"temperature": 0.8, "seed": 3, "n": 3},
    "beams": {"temperature": 0, "use_beam_search": True, "n": 2},
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"260": -5}},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("replicas-model"), options=OPTIONS) as service:
        until_healthy(service)
        yield service


def answer(service: Service, fields: dict[str, Any]) -> Any:
    """The choices of a completion."""
    body = {"prompt": PROMPT, "max_tokens": 24, **fields}
    response = httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return [(choice["text"], choice["logprobs"]) for choice in response.json()["choices"]]


@pytest.fixture(scope="module")
def expected(float32_server: Service) -> dict[str, Any]:
    """What a service with one worker answers."""
    return {name: answer(float32_server, fields) for name, fields in ASKED.items()}


def rounded(choices: Any) -> Any:
    """Log probabilities to three digits: their last bits depend on how a prompt was cut and cached."""
    return [
        (text, logprobs and [round(each, 3) for each in logprobs["token_logprobs"]])
        for text, logprobs in choices
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("replica", ["0", "1"])
def test_each_replica_gives_one_workers_answers(
    service: Service, expected: dict[str, Any], replica: str
) -> None:
    pid, other = str(service.process.pid), "1" if replica == "0" else "0"
    command(service, "drain", "--pid", pid, "--replica", other, "--timeout", "5")
    try:
        for name, fields in ASKED.items():
            assert rounded(answer(service, fields)) == rounded(expected[name]), name
    finally:
        command(service, "drain", "--pid", pid, "--replica", other, "--resume")
        until_healthy(service)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_answers_of_every_kind_survive_the_death_of_a_replica(
    service: Service, expected: dict[str, Any]
) -> None:
    answers: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda name=name: answers.__setitem__(name, answer(service, ASKED[name])))
        for name in ASKED
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    for name in ("scheduler-0", "engine-worker-0"):
        living(service)[name].send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert {name: rounded(each) for name, each in answers.items()} == {
        name: rounded(each) for name, each in expected.items()
    }
    until_healthy(service)
