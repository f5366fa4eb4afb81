"""generate and chat, against a server that answers with what it was asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc


class Echo(inference_pb2_grpc.InferenceServiceServicer):
    """Streams the last thing said back, word by word; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        said = request.text or request.messages.messages[-1].content
        if said == "fail":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are waiting")
        for word in said.split():
            yield pb.GenerateResponse(delta=pb.Delta(text=f"{word} "))
        yield pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_STOP))


@pytest.fixture
def echo() -> Iterator[tuple[Echo, str]]:
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


def pagewire(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagewire", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
        timeout=60,
        check=False,
    )


def test_generate_prints_the_completion_and_nothing_else(echo: tuple[Echo, str]) -> None:
    servicer, address = echo
    run = pagewire("generate", "m", "some [bold] text", "--url", address, "--max-tokens", "7", "--stop", "x")
    assert (run.returncode, run.stdout, run.stderr) == (0, "some [bold] text \n", "")
    [request] = servicer.requests
    assert request.model == "m"
    assert request.sampling == pb.SamplingParams(max_tokens=7, stop=["x"])


def test_generate_reads_standard_input(echo: tuple[Echo, str]) -> None:
    assert pagewire("generate", "m", "-", "--url", echo[1], stdin="two\nlines").stdout == "two lines \n"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--temperature", "-1"), 2, "pagewire: temperature is -1.0; it must be at least 0"),
        (("--dtype", "float32"), 2, "pagewire: --dtype float32 concerns a server started here"),
        ((), 1, "pagewire: too many requests are waiting"),
    ],
)
def test_generate_says_what_went_wrong(
    echo: tuple[Echo, str], options: tuple[str, ...], status: int, message: str
) -> None:
    run = pagewire("generate", "m", "fail", "--url", echo[1], *options)
    assert run.returncode == status
    assert run.stderr.startswith(message)
    assert "Traceback" not in run.stderr


def test_generate_reports_a_server_that_is_not_there() -> None:
    run = pagewire("generate", "m", "text", "--url", "127.0.0.1:1")
    assert run.returncode == 1
    assert "127.0.0.1:1" in run.stderr


def test_chat_keeps_the_history_until_it_is_cleared(echo: tuple[Echo, str]) -> None:
    servicer, address = echo
    lines = ["hello there", "fail", "and again", "/clear", "afresh", "/nonsense", "/exit", "unread"]
    run = pagewire("chat", "m", "--url", address, "--system", "be kind", stdin="\n".join(lines))
    assert run.returncode == 0, run.stderr
    conversations = [
        [(message.role, message.content) for message in request.messages.messages]
        for request in servicer.requests
    ]
    system, first = ("system", "be kind"), [("user", "hello there"), ("assistant", "hello there ")]
    assert conversations == [
        [system, ("user", "hello there")],
        [system, *first, ("user", "fail")],
        [system, *first, ("user", "and again")],
        [system, ("user", "afresh")],
    ]
    assert "error: too many requests are waiting" in run.stdout
    assert "unknown command /nonsense" in run.stdout
    assert run.stdout.startswith("hello there \n")
