"""Embeddings over both protocols, against a scheduler whose hidden states the tests choose."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest

from frontend.pooling import EmbeddingFacts
from pagewire.base.errors import Code, ConfigError, InvalidRequest
from pagewire.inference.v1 import inference_pb2, inference_pb2_grpc
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler, failure

URL = "/v1/embeddings"
AS_IT_IS = {"pooling": "last", "normalize": False}


def state(submit: pb.Submit) -> list[float]:
    """A vector that tells its request: length, first and last token, pooling."""
    return [len(submit.token_ids), submit.token_ids[0], submit.token_ids[-1], submit.pooling]


@pytest.fixture
async def http(frontend: RunningFrontend, scheduler: ScriptedScheduler):
    scheduler.pool = state
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


async def post(http: aiohttp.ClientSession, **body: object) -> tuple[int, dict]:
    async with http.post(URL, json=body) as response:
        return response.status, await response.json()


async def vectors(http: aiohttp.ClientSession, **body: object) -> list[list[float]]:
    status, answer = await post(http, **body)
    assert status == 200, answer
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return [entry["embedding"] for entry in answer["data"]]


async def test_every_form_of_input_is_embedded(http) -> None:
    for given, expected in (
        ("ab", [[2, 97, 98, 1]]),
        (["ab", "c"], [[2, 97, 98, 1], [1, 99, 99, 1]]),
        ([1, 2, 3], [[3, 1, 3, 1]]),
        ([[1, 2], [7]], [[2, 1, 2, 1], [1, 7, 7, 1]]),
    ):
        assert await vectors(http, input=given, **AS_IT_IS) == expected


async def test_answer_has_openais_shape_and_counts(http) -> None:
    _, answer = await post(http, input=["ab", "c"], pooling="mean", request_id="mine", user="someone")
    assert (answer["object"], answer["model"], answer["id"]) == ("list", "bytes", "embd-mine")
    usage = {"prompt_tokens": 3, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["usage"] == usage
    assert [entry["object"] for entry in answer["data"]] == ["embedding", "embedding"]


async def test_official_client_gets_numbers_from_base64(frontend, scheduler) -> None:
    scheduler.pool = state
    async with openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="-") as client:
        answer = await client.embeddings.create(model="bytes", input="ab", extra_body=AS_IT_IS)
        assert answer.data[0].embedding == [2, 97, 98, 1]


async def test_base64_is_little_endian_floats(http) -> None:
    [text] = await vectors(http, input="ab", encoding_format="base64", **AS_IT_IS)
    assert struct.unpack("<4f", base64.b64decode(text)) == (2, 97, 98, 1)


async def test_vectors_are_scaled_and_shortened(http, scheduler) -> None:
    scheduler.pool = lambda submit: [3, 4, 12, 84]
    assert await vectors(http, input="a", pooling="cls") == [
        pytest.approx([3 / 85, 4 / 85, 12 / 85, 84 / 85])
    ]
    assert await vectors(http, input="a", pooling="cls", dimensions=2) == [pytest.approx([0.6, 0.8])]
    assert await vectors(http, input="a", pooling="cls", dimensions=3, normalize=False) == [[3, 4, 12]]
    scheduler.pool = lambda submit: [0, 0, 0, 0]
    assert await vectors(http, input="a", pooling="cls") == [[0, 0, 0, 0]]


async def test_long_inputs_are_refused_or_cut(http) -> None:
    long = "x" * 150 + "y" * 100
    status, answer = await post(http, input=["a", long], pooling="last")
    assert status == 400
    assert answer["error"]["param"] == "input[1]"
    assert "250 tokens; at most 200" in answer["error"]["message"]
    assert await vectors(http, input=long, truncate_prompt_tokens=-1, **AS_IT_IS) == [[200, 120, 121, 1]]
    assert await vectors(http, input=[5] * 250, truncate_prompt_tokens=3, **AS_IT_IS) == [[3, 5, 5, 1]]
    assert await vectors(http, input="ab", truncate_prompt_tokens=3, **AS_IT_IS) == [[2, 97, 98, 1]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "must provide input"),
    ({"input": ""}, "input is empty"),
    ({"input": []}, "list of 0 inputs"),
    ({"input": ["a", ""]}, "input[1] is empty"),
    ({"input": [[]]}, "input is empty"),
    ({"input": [1, "a"]}, "input must be a string"),
    ({"input": 5}, "input must be a string"),
    ({"input": [300]}, "token id 300; ids must be between 0 and 256"),
    ({"input": [-1]}, "token id -1"),
    ({"input": ["a"] * 2049}, "input has 2049 entries; at most 2048 are taken"),
    ({"input": "a", "dimensions": 5}, "this model's vectors have 4 numbers"),
    ({"input": "a", "dimensions": 0}, "dimensions is 0"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
    ({"input": "a", "truncate_prompt_tokens": 201}, "at most 200 tokens"),
    ({"input": "a", "pooling": "max"}, "pooling is 'max'; it must be one of last, mean, cls"),
    ({"input": "a", "pooling": None}, "not made for embeddings; ask for a pooling"),
    ({"input": "a", "priority": 2**31}, "signed 32-bit"),
    ({"input": "a", "foo": 1}, "Unrecognized request argument supplied: foo"),
    ({"input": "a" * 10_000}, "10000 characters, which is more than 200 tokens"),
]


async def test_bad_requests_are_named(http, scheduler) -> None:
    for body, part in BAD:
        status, answer = await post(http, **{"pooling": "last", **body})
        assert (status, part in answer["error"]["message"]) == (400, True), answer
    assert scheduler.submits == []


async def test_many_inputs_are_submitted_a_bounded_number_at_a_time(http, scheduler) -> None:
    """Twice as many as the scheduler computes at once (8), so that none is refused for a full queue."""
    scheduler.pause_between_tokens = 0.02
    asking = asyncio.create_task(vectors(http, input=[[i % 256] for i in range(100)], **AS_IT_IS))
    await scheduler.submitted(16)
    assert len(scheduler.submits) == 16
    assert await asking == [[1, i, i, 1] for i in range(100)]


async def test_one_refusal_ends_the_request_and_aborts_the_rest(http, scheduler) -> None:
    scheduler.pool = None
    asking = asyncio.create_task(post(http, input=["a", "b", "c"], pooling="last"))
    submits = [await scheduler.submitted(count) for count in (1, 2, 3)]
    await scheduler.say(submits[1].handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "9 requests wait"))
    status, answer = await asking
    assert (status, answer["error"]["message"]) == (429, "9 requests wait")
    for submit in (submits[0], submits[2]):
        await scheduler.aborted(submit.handle)
    first = submits[0].request_id
    parts = [(submit.part, submit.request_id) for submit in submits]
    assert parts == [(0, first), (1, f"{first}-1"), (2, f"{first}-2")]


async def test_disconnected_client_aborts_all_inputs(frontend, scheduler) -> None:
    async with aiohttp.ClientSession(frontend.url) as session:
        asking = asyncio.create_task(post(session, input=["a", "b"], pooling="last"))
        submits = [await scheduler.submitted(count) for count in (1, 2)]
        asking.cancel()
        for submit in submits:
            await scheduler.aborted(submit.handle)


async def test_inputs_are_submitted_again_when_the_scheduler_is_replaced(http, scheduler) -> None:
    scheduler.pool = None
    asking = asyncio.create_task(vectors(http, input=["ab", "c"], **AS_IT_IS))
    await scheduler.submitted(2)
    await scheduler.stop()
    successor = ScriptedScheduler(scheduler.target.removeprefix("unix:"))
    successor.pool = state
    await successor.start()
    assert await asking == [[2, 97, 98, 1], [1, 99, 99, 1]]
    assert [submit.resumed for submit in successor.submits] == [True, True]
    await successor.stop()


async def test_hidden_states_that_are_not_finite_are_an_error(http, scheduler) -> None:
    scheduler.pool = lambda submit: [1, float("nan"), 0, 0]
    status, answer = await post(http, input="a", pooling="last")
    assert (status, "not finite" in answer["error"]["message"]) == (500, True)


async def test_embeddings_over_grpc(frontend: RunningFrontend, scheduler: ScriptedScheduler) -> None:
    scheduler.pool = state
    async with grpc.aio.insecure_channel(frontend.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        fields = {"pooling": inference_pb2.POOLING_MEAN, "normalize": False}
        answer = await stub.Embed(inference_pb2.EmbedRequest(texts=["ab", "c"], request_id="mine", **fields))
        assert [list(each.values) for each in answer.embeddings] == [[2, 97, 98, 2], [1, 99, 99, 2]]
        assert answer.request_id == "mine"
        assert answer.usage.prompt_tokens == 3
        ids = [inference_pb2.TokenIds(ids=[1, 2, 3])]
        request = inference_pb2.EmbedRequest(
            token_ids=ids, pooling=inference_pb2.POOLING_CLS, dimensions=2, truncate_prompt_tokens=2
        )
        [vector] = (await stub.Embed(request)).embeddings
        assert list(vector.values) == pytest.approx([2 / 5**0.5, 1 / 5**0.5])
        for wrong, part in (
            (inference_pb2.EmbedRequest(texts=["a"]), "not made for embeddings"),
            (inference_pb2.EmbedRequest(texts=["a"], token_ids=ids, **fields), "either texts or token_ids"),
            (inference_pb2.EmbedRequest(texts=["a"], pooling=9), "pooling is 9"),
            (inference_pb2.EmbedRequest(**fields), "list of 0 inputs"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=part) as raised:
                await stub.Embed(wrong)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def as_embedding_model(directory: Path, pooling: dict, *kinds: str, **files: dict) -> Path:
    """Adds what sentence-transformers writes."""
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"x.models.{kind}",
        }
        for index, kind in enumerate(("Transformer", "Pooling", *kinds))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


LAST = {"word_embedding_dimension": 4, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LAST, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ],
)
def test_models_own_pooling_is_read(tmp_path: Path, config: dict, expected: str) -> None:
    facts = EmbeddingFacts.load(as_embedding_model(tmp_path, config), None)
    assert (facts.pooling, facts.normalize, facts.obstacle) == (expected, False, None)


def test_what_cannot_be_followed_is_refused_unless_asked_otherwise(tmp_path: Path) -> None:
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    for name, config, kinds, part in (
        ("two", both, (), "mean_tokens and max_tokens"),
        ("dense", LAST, ("Dense",), "'Dense' module"),
    ):
        (tmp_path / name).mkdir()
        directory = as_embedding_model(tmp_path / name, config, *kinds)
        facts = EmbeddingFacts.load(directory, None)
        with pytest.raises(InvalidRequest, match=part):
            facts.choose(None)
        assert facts.choose("cls") == inference_pb2.POOLING_CLS
        assert EmbeddingFacts.load(directory, "last").choose(None) == inference_pb2.POOLING_LAST
    (tmp_path / "modules.json").write_text('{"no": "list"}')
    with pytest.raises(ConfigError, match=r"modules\.json"):
        EmbeddingFacts.load(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("modules.json", "[" * 10**5, "nested too deeply"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../other"}]', "stay in the model's directory"),
        ("modules.json", '[{"type": "x.Pooling", "path": "/etc"}]', "stay in the model's directory"),
        ("1_Pooling/config.json", '{"pooling_mode": 3}', "must be a name or a list"),
        ("sentence_bert_config.json", '{"max_seq_length": "512"}', "max_seq_length is '512'; it must be"),
        ("sentence_bert_config.json", '{"max_seq_length": true}', "max_seq_length is True; it must be"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length is 0; it must be"),
        ("config_sentence_transformers.json", "{", "not valid JSON"),
    ],
)
def test_a_wrong_file_of_an_embedding_model_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    directory = as_embedding_model(tmp_path, LAST)
    (directory / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        EmbeddingFacts.load(directory, None)


async def test_an_embedding_model_needs_no_pooling_in_requests(
    start_frontend: FrontendFactory, scheduler, model_dir: Path, tmp_path: Path
) -> None:
    scheduler.pool = lambda submit: [3, 4, 0, 0]
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    as_embedding_model(directory, LAST, "Normalize", sentence_bert_config={"max_seq_length": 20})
    frontend = await start_frontend(model=str(directory))
    async with aiohttp.ClientSession(frontend.url) as session:
        assert await vectors(session, input="abc") == [pytest.approx([0.6, 0.8, 0, 0])]
        assert scheduler.submits[0].pooling == inference_pb2.POOLING_LAST
        status, answer = await post(session, input="x" * 21)
        assert (status, "at most 20 are taken" in answer["error"]["message"]) == (400, True)


async def test_pooling_and_limit_of_the_command_line_hold(start_frontend: FrontendFactory, scheduler) -> None:
    scheduler.pool = state
    frontend = await start_frontend(pooling="cls", max_prompt_tokens=5)
    async with aiohttp.ClientSession(frontend.url) as session:
        assert await vectors(session, input="abcde", normalize=False) == [[5, 97, 101, 3]]
        status, answer = await post(session, input="abcdef")
        assert (status, "6 tokens; at most 5" in answer["error"]["message"]) == (400, True)
