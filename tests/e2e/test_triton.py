"""Triton's clients, and the commands of docs/triton.md, against a real service."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import tritonclient.grpc as tritongrpc
import tritonclient.http as tritonhttp

from tools.service import Service

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "triton.md").read_text()
QUESTION = "What is machine learning?"


def blocks(language: str) -> list[str]:
    return [part.partition("```")[0].strip() for part in DOCS.split(f"```{language}\n")[1:]]


def completion(server: Service, prompt: str, max_tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "repetition_penalty": 1}
    answer = httpx.post(f"{server.http_url}/v1/completions", json=body, timeout=60).json()
    return answer["choices"][0]["text"]


def inputs(client, text: str, max_tokens: int = 8, stream: bool = False) -> list:
    values = {
        "text_input": np.array([[text]], dtype=object),
        "max_tokens": np.array([[max_tokens]], dtype=np.int32),
        "stream": np.array([[stream]], dtype=bool),
    }
    given = []
    for (name, array), datatype in zip(values.items(), ("BYTES", "INT32", "BOOL"), strict=True):
        given.append(client.InferInput(name, array.shape, datatype))
        given[-1].set_data_from_numpy(array)
    return given


def test_the_commands_of_the_docs_answer_what_completions_do(server: Service) -> None:
    whole, stream = (
        subprocess.run(
            shlex.split(command.replace("localhost:8000", server.http_url.removeprefix("http://"))),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for command in blocks("sh")
    )
    expected = completion(server, QUESTION, 20)
    assert json.loads(whole)["text_output"] == QUESTION + expected
    deltas = [json.loads(frame.removeprefix("data: ")) for frame in stream.strip().split("\n\n")]
    assert len(deltas) > 10
    assert "".join(delta["text_output"] for delta in deltas) == expected


def test_the_program_of_the_docs_works(server: Service) -> None:
    (program,) = blocks("python")
    program = program.replace("localhost:50051", server.grpc_target)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    text = "The capital of France is"
    assert run.stdout.strip() == (text + completion(server, text, 8)).strip()


def test_tritons_clients_answer_the_same_over_both_protocols(server: Service) -> None:
    with tritonhttp.InferenceServerClient(server.http_url.removeprefix("http://"), concurrency=4) as client:
        assert client.is_server_ready()
        calls = [
            client.async_infer(
                "ensemble", inputs(tritonhttp, f"{number} is a number that"), request_id=str(number)
            )
            for number in range(4)
        ]
        over_http = {call_.get_response()["id"]: call_ for call_ in [call.get_result() for call in calls]}
        whole = {name: result.as_numpy("text_output")[0].decode() for name, result in over_http.items()}
    came: queue.Queue = queue.Queue()
    streamed: dict[str, str] = {}
    with tritongrpc.InferenceServerClient(server.grpc_target) as client:
        client.start_stream(callback=lambda result, error: came.put((result, error)))
        for number in range(4):
            client.async_stream_infer(
                "ensemble",
                inputs(tritongrpc, f"{number} is a number that", stream=True),
                request_id=str(number),
                enable_empty_final_response=True,
            )
        finals = 0
        while finals < 4:
            result, error = came.get(timeout=60)
            assert error is None
            response = result.get_response()
            if response.parameters["triton_final_response"].bool_param:
                finals += 1
                assert not response.outputs
            else:
                delta = result.as_numpy("text_output")[0].decode()
                streamed[response.id] = streamed.get(response.id, "") + delta
        client.stop_stream()
    assert whole == {name: f"{name} is a number that{text}" for name, text in streamed.items()}
