"""Triton's HTTP endpoints, asked by curl and by Triton's own client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from frontend.http.triton import answers
from frontend.triton.inputs import INPUTS, OUTPUTS
from pagewire.scheduler.v1 import scheduler_pb2
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

pytest.importorskip("tritonclient")

import tritonclient.http.aio as tritonhttp
from tritonclient.utils import InferenceServerException

ARTICLE = '{"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}'
PARAMETERS = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}


async def curl(*arguments: str) -> tuple[int, str]:
    """The status and the body that curl gets."""
    command = ("curl", "-sS", "-w", "\n%{http_code}", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    body, _, status = output.decode().rpartition("\n")
    return int(status), body


async def post(frontend: RunningFrontend, path: str, body: object) -> tuple[int, dict]:
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post(path, json=body) as response:
            return response.status, await response.json()


async def events(frontend: RunningFrontend, body: object, model: str = "ensemble") -> list[dict]:
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post(f"/v2/models/{model}/generate_stream", json=body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            frames = (await response.text()).removesuffix("\n\n").split("\n\n")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def tensor(name: str, values: object, datatype: str) -> tritonhttp.InferInput:
    array = np.array(values, dtype={"BYTES": object, "INT32": np.int32, "BOOL": bool}[datatype])
    given = tritonhttp.InferInput(name, array.shape, datatype)
    given.set_data_from_numpy(array)
    return given


def prompt(*texts: str, max_tokens: int = 20) -> list[tritonhttp.InferInput]:
    return [
        tensor("text_input", [[text] for text in texts], "BYTES"),
        tensor("max_tokens", [[max_tokens]] * len(texts), "INT32"),
    ]


async def test_the_articles_curl_line_works_unchanged(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    """curl sends it as application/x-www-form-urlencoded."""
    scheduler.reply = b" It learns."
    for model in ("ensemble", "tensorrt_llm_bls", "bytes"):
        status, body = await curl(
            "-X", "POST", f"127.0.0.1:{frontend.http.port}/v2/models/{model}/generate", "-d", ARTICLE
        )
        assert (status, json.loads(body)) == (
            200,
            {
                "model_name": model,
                "model_version": "1",
                **PARAMETERS,
                "text_output": "What is machine learning? It learns.",
            },
        )
        answers.GenerateAnswer.model_validate(json.loads(body))
    sampling = scheduler.submits[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (20, 0.0)


async def test_the_articles_stream_has_deltas_without_the_prompt(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"abc"
    scheduler.pause_between_tokens = 0.01
    body = {**json.loads(ARTICLE), "stream": True, "id": "mine"}
    told = await events(frontend, body)
    assert "".join(each["text_output"] for each in told) == "abc"
    assert len(told) > 2
    assert {each["id"] for each in told} == {"mine"}
    for each in told:
        answers.GenerateAnswer.model_validate(each)
    del body["stream"]
    assert [each["text_output"] for each in await events(frontend, body)] == ["What is machine learning?abc"]


async def test_parameters_mean_the_same_inside_parameters_and_out(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"abc"
    fields = {
        "max_tokens": 7,
        "top_k": 5,
        "top_p": 0.5,
        "temperature": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "min_length": 2,
        "random_seed": 2**64 - 3,
        "end_id": 99,
        "pad_id": 1,
        "bad_words": ["x"],
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_context_logits": False,
    }
    bodies = ({"text_input": "hi", **fields}, {"text_input": "hi", "parameters": fields})
    told = [await post(frontend, "/v2/models/bytes/generate", body) for body in bodies]
    assert told[0] == told[1]
    status, answer = told[0]
    assert (status, answer["text_output"]) == (200, "ab")  # c is the end_id
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (2, 3)
    for submit in scheduler.submits:
        sampling = submit.sampling
        assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k) == (7, 2, 5)
        assert (sampling.top_p, sampling.temperature, sampling.seed) == (0.5, 0.25, -3)
        assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, 0.5)
        assert (sampling.frequency_penalty, sampling.ignore_eos) == (-0.5, True)
        assert list(sampling.stop_token_ids) == [99]
        assert [list(word.ids) for word in submit.bad_words] == [[120], [32, 120]]


async def test_a_temperature_alone_is_greedy_as_with_tensorrt_llm(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b""
    for further, expected in (
        ({"temperature": 0.7}, 0.0),
        ({"temperature": 0.75, "top_p": 0.5}, 0.75),
        ({"top_k": 3}, 1.0),
        ({"top_k": 0, "top_p": 0.0}, 0.0),
    ):
        body = {"text_input": "hi", "max_tokens": 3, **further}
        assert (await post(frontend, "/v2/models/bytes/generate", body))[0] == 200
        assert scheduler.submits[-1].sampling.temperature == expected


async def test_stop_words_end_a_text(frontend: RunningFrontend, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"one two three"
    body = {"text_input": "", "parameters": {"max_tokens": 50, "stop_words": ["two", ""]}}
    status, answer = await post(frontend, "/v2/models/bytes/generate", {**body, "text_input": "0 "})
    assert (status, answer["text_output"]) == (200, "0 one ")


async def test_several_sequences_and_log_probabilities(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    body = {
        "text_input": "hi",
        "max_tokens": 2,
        "num_return_sequences": 2,
        "return_log_probs": True,
        "top_k": 2,
        "exclude_input_in_output": True,
    }
    asking = asyncio.create_task(post(frontend, "/v2/models/bytes/generate", body))
    await scheduler.submitted(2)
    for number, submit in enumerate(scheduler.submits):
        assert submit.sampling.HasField("logprobs")
        await scheduler.say(
            submit.handle,
            [97 + number, 98],
            logprobs=[scheduler_pb2.TokenLogprobs(logprob=value) for value in (-0.5, -0.25)],
            end=scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_LENGTH),
        )
    status, answer = await asking
    assert status == 200
    assert answer["text_output"] == ["ab", "bb"]
    assert answer["sequence_index"] == [0, 1]
    assert answer["cum_log_probs"] == [-0.75, -0.75]
    assert answer["output_log_probs"] == [-0.5, -0.25, -0.5, -0.25]
    answers.GenerateAnswer.model_validate(answer)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"max_tokens": 5}, "needs the input text_input"),
        ({"text_input": "hi"}, "needs the input max_tokens"),
        ({"text_input": "hi", "max_tokens": 50.0}, "max_tokens"),
        ({"text_input": "hi", "max_tokens": 0}, "at least 1"),
        ({"text_input": ["a", "b"], "max_tokens": 5}, "text_input has the shape [2]"),
        ({"text_input": "hi", "max_tokens": 5, "max_token": 5}, "max_token"),
        ({"text_input": "hi", "max_tokens": 5, "parameters": {"max_token": 5}}, "max_token"),
        ({"text_input": "hi", "max_tokens": 5, "parameters": {"max_tokens": 5}}, "twice"),
        ({"text_input": "hi", "max_tokens": 5, "stream": True}, "generate_stream"),
        ({"text_input": "hi", "max_tokens": 5, "return_context_logits": True}, "return_context_logits"),
        ({"text_input": "hi", "max_tokens": 5, "num_draft_tokens": 2}, "num_draft_tokens"),
        ({"text_input": "hi", "max_tokens": 5, "top_p": 2.0}, "top_p"),
        ({"text_input": "hi", "max_tokens": 5, "temperature": -1}, "temperature"),
        ({"text_input": "hi", "max_tokens": 5, "guided_decoding_guide_type": "x"}, "guide_type"),
        ({"text_input": "hi", "max_tokens": 5, "parameters": {"timeout": 10**400}}, "timeout"),
        ({"text_input": "hi", "max_tokens": 5, "temperature": 10**400}, "temperature"),
        ([], "JSON object"),
    ],
)
async def test_what_is_wrong_is_told_as_triton_does(frontend: RunningFrontend, body, part) -> None:
    status, answer = await post(frontend, "/v2/models/ensemble/generate", body)
    assert status == 400
    assert list(answer) == ["error"]
    assert part in answer["error"]


async def test_statuses_and_errors_of_paths(frontend: RunningFrontend) -> None:
    async with aiohttp.ClientSession(frontend.url) as session:
        for method, path, expected in (
            ("POST", "/v2/models/none/generate", 404),
            ("POST", "/v2/models/bytes/versions/2/generate", 404),
            ("GET", "/v2/models/none", 404),
            ("GET", "/v2/models/none/config", 404),
            ("GET", "/v2/nothing", 404),
            ("GET", "/v2/models/bytes/generate", 405),
            ("GET", "/v2/models/bytes/versions/1/generate_stream", 405),
            ("PUT", "/v2/models/bytes/versions/1/infer", 405),
            ("POST", "/v2/models/bytes", 405),
            ("POST", "/v2/systemsharedmemory/unregister", 404),
        ):
            async with session.request(method, path, json={}) as response:
                assert response.status == expected, path
                error = await response.json()
                assert list(error) == ["error"], path
                assert isinstance(error["error"], str)


async def test_too_much_to_do_is_a_503_with_retry_after(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    body = {"text_input": "hi", "max_tokens": 5}
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(session.post("/v2/models/bytes/generate", json=body))
        submit = await scheduler.submitted()
        refusal = scheduler_pb2.Ended(
            reason=scheduler_pb2.END_REASON_ERROR, status=8, error="too much", retry_after=3
        )
        await scheduler.say(submit.handle, [], end=refusal)
        response = await asking
        assert (response.status, response.headers["retry-after"]) == (503, "3")
        assert await response.json() == {"error": "too much"}


async def test_a_stream_that_fails_ends_with_an_error(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    asking = asyncio.create_task(
        events(frontend, {"text_input": "hi", "max_tokens": 5, "parameters": {"stream": True}})
    )
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [97])
    await asyncio.sleep(0.1)
    lost = scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_ERROR, status=13, error="it broke")
    await scheduler.say(submit.handle, [], end=lost)
    told = await asking
    assert told[0]["text_output"] == "a"
    assert told[-1] == {"error": "it broke"}


async def test_a_client_that_leaves_aborts_its_stream(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    body = {"text_input": "hi", "max_tokens": 50, "stream": True}
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(session.post("/v2/models/bytes/generate_stream", json=body))
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, [97])
        (await asking).close()
    await scheduler.aborted(submit.handle)


async def test_keys_are_asked_for_but_not_of_probes(start_frontend: FrontendFactory) -> None:
    frontend = await start_frontend(api_keys=("secret",))
    async with aiohttp.ClientSession(frontend.url) as session:
        for path, expected in (
            ("/v2/health/live", 200),
            ("/v2/health/ready", 200),
            ("/v2", 401),
            ("/v2/models/bytes", 401),
        ):
            async with session.get(path) as response:
                assert response.status == expected, path
                if expected == 401:
                    assert list(await response.json()) == ["error"]
        async with session.get("/v2", headers={"authorization": "Bearer secret"}) as response:
            answers.ServerMetadataAnswer.model_validate(await response.json())


async def test_tritons_client_is_told_of_server_and_model(frontend: RunningFrontend) -> None:
    async with tritonhttp.InferenceServerClient(f"127.0.0.1:{frontend.http.port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("ensemble")
        assert await client.is_model_ready("bytes", "1")
        assert not await client.is_model_ready("none")
        assert (await client.get_server_metadata())["name"] == "pagewire"
        metadata = await client.get_model_metadata("ensemble", "1")
        answers.ModelMetadataAnswer.model_validate(metadata)
        assert {"name": "max_tokens", "datatype": "INT32", "shape": [-1, 1]} in metadata["inputs"]
        config = await client.get_model_config("tensorrt_llm_bls")
        answers.ModelConfigAnswer.model_validate(config)
        assert config["model_transaction_policy"] == {"decoupled": True}
        index = await client.get_model_repository_index()
        assert [(each["name"], each["state"]) for each in index] == [
            ("bytes", "READY"),
            ("ensemble", "READY"),
            ("tensorrt_llm_bls", "READY"),
        ]
        with pytest.raises(InferenceServerException, match="unknown model 'none'") as raised:
            await client.get_model_metadata("none")
        assert raised.value.status() == "404"


async def test_a_server_without_an_engine_is_not_ready(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.ready = False
    frontend = await start_frontend(wait=False)
    async with tritonhttp.InferenceServerClient(f"127.0.0.1:{frontend.http.port}") as client:
        assert await client.is_server_live()
        assert not await client.is_server_ready()
        assert not await client.is_model_ready("ensemble")
        assert {each["state"] for each in await client.get_model_repository_index()} == {"UNAVAILABLE"}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_tritons_client_infers(
    frontend: RunningFrontend, scheduler: ScriptedScheduler, binary: bool, compression: str | None
) -> None:
    scheduler.reply = "é!".encode()
    inputs = prompt("hello")
    if not binary:
        inputs[0].set_data_from_numpy(np.array([["hello"]], dtype=object), binary_data=False)
    outputs = None
    if not binary:
        outputs = [tritonhttp.InferRequestedOutput("text_output", binary_data=False)]
    async with tritonhttp.InferenceServerClient(f"127.0.0.1:{frontend.http.port}") as client:
        result = await client.infer(
            "ensemble", inputs, outputs=outputs, request_id="7", request_compression_algorithm=compression
        )
    answer = result.get_response()
    answers.InferAnswer.model_validate(answer)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "ensemble", "1")
    text = result.as_numpy("text_output")
    assert text.shape == (1,)
    assert (text[0].decode() if binary else text[0]) in ("helloé!", "helloé!".encode())


async def test_a_batch_is_answered_row_by_row_with_only_the_outputs_asked_for(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"!"
    outputs = [
        tritonhttp.InferRequestedOutput(name) for name in ("batch_index", "text_output", "num_input_tokens")
    ]
    async with tritonhttp.InferenceServerClient(f"127.0.0.1:{frontend.http.port}") as client:
        result = await client.infer("ensemble", prompt("a", "bc"), outputs=outputs)
        assert [each["name"] for each in result.get_response()["outputs"]] == [
            "text_output",
            "batch_index",
            "num_input_tokens",
        ]
        assert list(result.as_numpy("text_output")) == [b"a!", b"bc!"]
        assert result.as_numpy("batch_index").tolist() == [[0], [1]]
        assert result.as_numpy("num_input_tokens").tolist() == [[1], [2]]
        uneven = [
            tensor("text_input", [["a"], ["b"]], "BYTES"),
            tensor("max_tokens", [[1], [2]], "INT32"),
        ]
        with pytest.raises(InferenceServerException, match="not the same for all prompts"):
            await client.infer("ensemble", uneven)
        with pytest.raises(InferenceServerException, match="unexpected inference output"):
            await client.infer("ensemble", prompt("a"), outputs=[tritonhttp.InferRequestedOutput("nothing")])
        with pytest.raises(InferenceServerException, match="unexpected inference input"):
            await client.infer("ensemble", [*prompt("a"), tensor("nothing", [[1]], "INT32")])


@pytest.mark.parametrize(
    ("inputs", "length", "tail", "part"),
    [
        ([{"name": "text_input", "shape": [1, 1], "datatype": "BYTES"}], None, b"", "binary_data_size"),
        (
            [{"name": "a", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}}],
            None,
            b"",
            "0 are left",
        ),
        (
            [{"name": "a", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}],
            None,
            b"\xff\xff\xff\xffx",
            "ends within",
        ),
        (
            [{"name": "a", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": 5}}],
            None,
            b"12345",
            "need 4",
        ),
        ([{"name": "a", "shape": [2**40, 2**40], "datatype": "INT32", "data": []}], None, b"", "shape"),
        ([{"name": "a", "shape": [-1], "datatype": "INT32", "data": []}], None, b"", "shape"),
        ([{"name": "a", "shape": [1], "datatype": "BF16", "data": [1]}], None, b"", "datatype"),
        ([{"name": "a", "shape": [1], "datatype": "INT8", "data": [300]}], None, b"", "between -128 and 127"),
        ([{"name": "a", "shape": [1], "datatype": "INT32", "data": [[[[1]]]]}], None, b"", "nested"),
        ([{"name": "a", "shape": [1], "datatype": "INT32", "data": [1]}], "99999", b"", "at most"),
        ([{"name": "a", "shape": [1], "datatype": "INT32", "data": [1]}], None, b"more", "behind"),
        (
            [{"name": "a", "shape": [1], "datatype": "BYTES", "parameters": {"shared_memory_region": "x"}}],
            None,
            b"",
            "shared_memory_region",
        ),
    ],
)
async def test_tensors_that_contradict_themselves_are_refused(
    frontend: RunningFrontend, inputs, length, tail, part
) -> None:
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": length or str(len(head))}
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post("/v2/models/ensemble/infer", data=head + tail, headers=headers) as response:
            answer = await response.json()
            assert (response.status, list(answer)) == (400, ["error"])
            assert part in answer["error"]


async def test_requests_are_counted_whatever_protocol_they_came_by(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"ab"
    scheduler.pause_between_tokens = 0.01
    assert (await post(frontend, "/v1/completions", {"prompt": ["x", "y"], "max_tokens": 5}))[0] == 200
    assert (await post(frontend, "/v2/models/ensemble/generate", json.loads(ARTICLE)))[0] == 200
    assert (await post(frontend, "/v1/completions", {"prompt": "x", "max_tokens": 500}))[0] == 200
    too_long = {"text_input": "x" * 300, "max_tokens": 5}
    assert (await post(frontend, "/v2/models/ensemble/generate", too_long))[0] == 400
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/v2/models/ensemble/stats") as response:
            statistics = await response.json()
        async with session.get("/v2/models/stats") as response:
            assert len((await response.json())["model_stats"]) == 3
        async with session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
    answers.StatisticsAnswer.model_validate(statistics)
    counted = statistics["model_stats"][0]
    assert (counted["inference_count"], counted["execution_count"]) == (4, 3)
    spent = {name: each["ns"] for name, each in counted["inference_stats"].items()}
    assert counted["inference_stats"]["fail"]["count"] == 1
    assert spent["success"] >= spent["compute_infer"] > 20_000_000
    assert spent["queue"] > 0
    assert spent["compute_input"] > 0
    values = {}
    for line in lines:
        if line.startswith("nv_"):
            name, _, value = line.rpartition(" ")
            labels = [part for part in name[:-1].partition("{")[2].split(",") if "frontend" not in part]
            values[name.partition("{")[0], *labels] = float(value)
    model = ('model="bytes"', 'version="1"')
    assert values["nv_inference_request_success", *model] == 3
    assert values["nv_inference_count", *model] == 4
    assert values["nv_inference_request_failure", *model, 'reason="OTHER"'] == 1
    assert values["nv_inference_request_failure", *model, 'reason="REJECTED"'] == 0
    assert values["nv_inference_pending_request_count", *model] == 0
    assert values["nv_inference_request_duration_us", *model] > 20_000
    assert values["nv_inference_queue_duration_us", *model] > 0
    for kind, count in (("max", 100), ("used", 25), ("free", 75), ("tokens_per", 16)):
        block = ("nv_trt_llm_kv_cache_block_metrics", *model, f'kv_cache_block_type="{kind}"')
        assert values[block] == count


def test_the_docs_tell_of_every_input_and_output() -> None:
    docs = (Path(__file__).resolve().parents[3] / "docs" / "triton.md").read_text()
    for heading, names in (("Inputs", INPUTS), ("Outputs", OUTPUTS)):
        section = docs.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        assert {name.strip("` ") for row in rows for name in row.split(",")} == set(names)
