"""/v1/rerank, /v1/score and /v1/classify, and the same over gRPC: what they take and answer, by what kind of
model, and what each kind refuses."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from frontend.http.body import parse
from frontend.http.scoring.bodies import RerankBody, ScoreBody
from frontend.pooled import PooledRequest, TextPair
from frontend.scoring.facts import ScoringFacts
from frontend.scoring.pairs import read_pairs
from frontend.scoring.template import PairTemplate
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError, InvalidRequest, Unsupported
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

RERANK = {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": False}
ASKED = {
    "/rerank": [RERANK, {**RERANK, "model": "bytes", "truncate_prompt_tokens": -1}],
    "/score": [
        {"text_1": "q", "text_2": "a"},
        {"text_1": ["q"], "text_2": ["a", "b"]},
        {"queries": ["q", "r"], "documents": ["a", "b"], "use_activation": False},
    ],
    "/classify": [{"input": "a"}, {"input": ["a", "b"]}, {"input": [1, 2]}, {"input": [[1], [2]]}],
}
WRONG = {
    "no query": ("/rerank", {"documents": ["a"]}, "must provide query"),
    "no documents": ("/rerank", {"query": "q", "documents": []}, "documents must be a list of 1 to 2048"),
    "top_n": ("/rerank", {**RERANK, "top_n": 0}, "top_n is wrong"),
    "unknown field": ("/rerank", {**RERANK, "foo": 1}, "supplied: foo"),
    "unknown field of a document": (
        "/rerank",
        {"query": "q", "documents": [{"text": "a", "foo": 1}]},
        "supplied: documents[0].foo",
    ),
    "one side": ("/score", {"text_1": "a"}, "send text_1 and text_2, or queries and documents"),
    "mixed sides": ("/score", {"text_1": "a", "documents": "b"}, "send text_1 and text_2"),
    "numbers": ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2 texts and text_2 1"),
    "no input": ("/classify", {}, "must provide input"),
    "another input": ("/classify", {"input": {"a": 1}}, "input must be a string"),
}


async def ask(frontend: RunningFrontend, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post(path, json=body) as response:
            return response.status, (await response.json())["error"]


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("path", ASKED)
async def test_a_model_without_a_head_says_what_it_would_take(
    frontend: RunningFrontend, path: str, prefix: str
) -> None:
    for body in ASKED[path]:
        status, error = await ask(frontend, prefix + path, body)
        assert (status, error["param"]) == (400, "model"), error
        assert "'bytes' has no classification head" in error["message"]
        assert "ForSequenceClassification" in error["message"]


def logits_of(submit: pb.Submit) -> list[float]:
    """Two classes: the logits tell the length and the last token."""
    return [float(len(submit.token_ids)), submit.token_ids[-1] / 100]


@pytest.fixture
async def classifier(scheduler: ScriptedScheduler, start_frontend: FrontendFactory) -> RunningFrontend:
    scheduler.task, scheduler.labels = "classify", ["bad", "good"]
    scheduler.pool = logits_of
    return await start_frontend()


@pytest.fixture
async def cross_encoder(scheduler: ScriptedScheduler, start_frontend: FrontendFactory) -> RunningFrontend:
    scheduler.task, scheduler.labels = "classify", ["relevance"]
    scheduler.pool = lambda submit: [submit.token_ids[-1] - 98.0]
    return await start_frontend()


async def post(frontend: RunningFrontend, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.post(path, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer


def softmax(*logits: float) -> list[float]:
    exponents = np.exp(np.array(logits) - max(logits))
    return pytest.approx((exponents / exponents.sum()).tolist(), rel=1e-5)


async def test_texts_and_tokens_are_classified(classifier: RunningFrontend) -> None:
    for given, rows in (
        ("aa", [(2.0, 0.97)]),
        (["a", "bbb"], [(1.0, 0.97), (3.0, 0.98)]),
        ([1, 2, 200], [(3.0, 2.0)]),
        ([[1], [2, 3]], [(1.0, 0.01), (2.0, 0.03)]),
    ):
        answer = await post(classifier, "/v1/classify", {"input": given})
        assert (answer["object"], answer["model"]) == ("list", "bytes")
        for index, (entry, logits) in enumerate(zip(answer["data"], rows, strict=True)):
            assert (entry["index"], entry["label"], entry["num_classes"]) == (index, "bad", 2)
            assert entry["probs"] == softmax(*logits)
    raw = await post(classifier, "/classify", {"input": [150, 200], "use_activation": False})
    assert raw["data"][0]["probs"] == [2.0, 2.0]
    assert raw["usage"]["prompt_tokens"] == 2


async def test_documents_are_ranked_by_their_scores(
    cross_encoder: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    asked = {"query": "q", "documents": ["xa", {"text": "xc"}, "xb"]}
    expected = {0: 1 / (1 + math.e), 1: math.e / (1 + math.e), 2: 0.5}
    answer = await post(cross_encoder, "/v1/rerank", asked)
    assert [entry["index"] for entry in answer["results"]] == [1, 2, 0]
    for entry in answer["results"]:
        assert entry["relevance_score"] == pytest.approx(expected[entry["index"]])
    assert [entry["document"]["text"] for entry in answer["results"]] == ["xc", "xb", "xa"]
    assert sorted(bytes(each.token_ids) for each in scheduler.submits) == [b"qxa", b"qxb", b"qxc"]
    [best] = (await post(cross_encoder, "/rerank", {**asked, "top_n": 1}))["results"]
    assert best["index"] == 1
    for entry in (await post(cross_encoder, "/v2/rerank", asked))["results"]:
        assert "document" not in entry
    raw = await post(cross_encoder, "/v1/rerank", {**asked, "use_activation": False})
    assert [entry["relevance_score"] for entry in raw["results"]] == [1, 0, -1]


async def test_pairs_are_scored_over_http_and_grpc(cross_encoder: RunningFrontend) -> None:
    answer = await post(cross_encoder, "/v1/score", {"text_1": "q", "text_2": ["b", "c"]})
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx([0.5, math.e / (1 + math.e)])
    async with AsyncClient(cross_encoder.target) as client:
        assert await client.score("q", ["b", "c"]) == pytest.approx(scores)
        assert await client.score(["q", "r"], ["b", "c"], use_activation=False) == [0, 1]
        with pytest.raises(InvalidRequest, match="queries has 2 texts and documents 3"):
            await client.score(["q", "r"], ["a", "b", "c"])
        with pytest.raises(InvalidRequest, match="documents must be a list of 1 to 2048"):
            await client.score("q", [])


async def test_a_long_pair_is_refused_or_loses_the_end_of_its_document(
    cross_encoder: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    long = {"text_1": "qq", "text_2": "a" * 150 + "b" * 150}
    status, error = await ask(cross_encoder, "/v1/score", long)
    assert (status, "302 tokens; at most 200" in error["message"]) == (400, True)
    await post(cross_encoder, "/v1/score", {**long, "truncate_prompt_tokens": -1})
    assert bytes(scheduler.submits[-1].token_ids) == b"qq" + b"a" * 150 + b"b" * 48


async def test_classes_over_grpc_have_their_names(classifier: RunningFrontend) -> None:
    async with AsyncClient(classifier.target) as client:
        answer = await client.classify(["a", "bbb"], truncate_prompt_tokens=2, request_id="mine")
        assert (answer.request_id, list(answer.labels)) == ("mine", ["bad", "good"])
        assert [entry.label for entry in answer.classifications] == ["bad", "bad"]
        assert list(answer.classifications[1].probs) == softmax(2.0, 0.98)
        raw = await client.classify("a", use_activation=False)
        assert list(raw.classifications[0].probs) == pytest.approx([1.0, 0.97])


async def test_a_classifier_with_several_classes_scores_no_pairs(classifier: RunningFrontend) -> None:
    status, error = await ask(classifier, "/v1/score", {"text_1": "a", "text_2": "b"})
    assert (status, error["param"]) == (400, "model")
    assert "this model has 2 classes; pairs are scored by models with one" in error["message"]


GENERATING = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    "/api/generate": {"model": "bytes", "prompt": "a"},
    "/api/chat": {"model": "bytes", "messages": [{"role": "user", "content": "a"}]},
    "/v2/models/bytes/generate": {"text_input": "a", "max_tokens": 3},
}


@pytest.mark.parametrize(("task", "part"), [("classify", "classification head"), ("embed", "no output proj")])
async def test_generation_is_refused_on_every_protocol(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory, task: str, part: str
) -> None:
    scheduler.task, scheduler.labels = task, ["a"] if task == "classify" else []
    frontend = await start_frontend()
    async with aiohttp.ClientSession(frontend.url) as session:
        for path, body in GENERATING.items():
            async with session.post(path, json=body) as response:
                assert response.status == (501 if path.startswith("/v2") else 400), path
                assert part in await response.text(), path
    async with AsyncClient(frontend.target) as client:
        with pytest.raises(Unsupported, match=part):
            await client.generate("a", SamplingParams(max_tokens=3))
        with pytest.raises(Unsupported, match=part):
            [_ async for _ in client.generate("a", stream=True)]
    assert scheduler.submits == []


async def test_embeddings_of_a_classifier_are_refused(classifier: RunningFrontend) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/api/embed", {"model": "bytes", "input": "a"})):
        async with aiohttp.ClientSession(classifier.url) as session:
            async with session.post(path, json={**body, "pooling": "mean"}) as response:
                assert response.status == 400
                assert "turns no texts into vectors" in await response.text()


async def test_a_decoder_alone_is_pooled_by_its_last_token_and_compares_texts(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory
) -> None:
    scheduler.task = "embed"
    scheduler.pool = lambda submit: [3, 4, 0, 0] if submit.token_ids[0] == ord("a") else [0, 2, 0, 0]
    frontend = await start_frontend()
    answer = await post(frontend, "/v1/embeddings", {"input": "ab"})
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8, 0, 0])
    assert scheduler.submits[0].pooling == inference_pb2.POOLING_LAST
    answer = await post(frontend, "/v1/score", {"text_1": "a", "text_2": ["b", "a"]})
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([0.8, 1.0])
    assert len(scheduler.submits) == 3  # each text once
    status, error = await ask(frontend, "/v1/classify", {"input": "a"})
    assert (status, "no classification head" in error["message"]) == (400, True)


async def test_a_generator_scores_by_the_tokens_that_say_no_and_yes(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory
) -> None:
    """It is asked for each token's log probability; the second request finds the first one's blocks."""
    template = "<q>{query}</q><d>{document}</d>?"
    frontend = await start_frontend(score_template=template, classifier_from_token=("n", "y"))
    asking = asyncio.create_task(post(frontend, "/v1/score", {"text_1": "{document}", "text_2": "x"}))
    for count, (token, logprob) in enumerate((("n", -3.0), ("y", -1.0)), start=1):
        submit = await scheduler.submitted(count)
        assert bytes(submit.token_ids) == b"<q>{document}</q><d>x</d>?"
        assert list(submit.sampling.allowed_token_ids) == [ord(token)]
        told = [pb.TokenLogprobs(logprob=logprob)]
        end = pb.Ended(reason=pb.END_REASON_LENGTH)
        await scheduler.say(submit.handle, [ord(token)], logprobs=told, end=end)
    answer = await asking
    assert answer["data"][0]["score"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert answer["usage"]["prompt_tokens"] == len("<q>{document}</q><d>x</d>?")


def test_a_template_cuts_the_document_and_keeps_its_own_end(model_dir: Path) -> None:
    tokenizer = TextTokenizer.load(model_dir)
    template = PairTemplate.load("{query}|{document}|end")

    def read(kept: int | None, first: str, second: str) -> bytes:
        pair = TextPair(first=first, second=second)
        request = PooledRequest(request_id="", model="", inputs=[pair], truncate_prompt_tokens=kept)
        return bytes(read_pairs(tokenizer, template, request, 20, 257)[0])

    assert read(None, "q", "doc") == b"q|doc|end"
    assert read(10, "q", "document") == b"q|docu|end"
    assert read(-1, "q", "d" * 15) == b"q|" + b"d" * 14 + b"|end"
    assert read(19, "q", "é" * 9) == "q|éééééé|end".encode()  # no half character
    with pytest.raises(InvalidRequest, match="31 tokens; at most 20"):
        read(None, "q" * 15, "d" * 11)
    with pytest.raises(InvalidRequest, match="no room for its second text"):
        read(10, "q" * 9, "doc")


@pytest.mark.parametrize(
    ("config", "logits", "probabilities", "score"),
    [
        ({}, [0.0, 0.0], [0.5, 0.5], 0.5),
        ({"problem_type": "multi_label_classification"}, [0.0, 50.0], [0.5, 1.0], 0.5),
        ({"problem_type": "regression"}, [0.0, 7.0], [0.0, 7.0], 0.5),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, [0.0], [0.5], 0.0),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, [0], [0.5], 0.5),
    ],
)
def test_config_json_says_what_logits_become(
    model_dir: Path, config: dict, logits: list, probabilities: list, score: float
) -> None:
    facts = ScoringFacts.load(config, TextTokenizer.load(model_dir))
    assert facts.probabilities(np.array(logits, np.float32)).tolist() == pytest.approx(probabilities)
    assert facts.score(logits[0]) == score


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"classifier_from_token": ("no", "yes"), "score_template": "{query}{document}"},
            "'no', which is not",
        ),
        ({"classifier_from_token": ("n",), "score_template": "{query}{document}"}, "two tokens"),
        ({"classifier_from_token": ("n", "y")}, "given with classifier_from_token"),
        ({"score_template": "no-such-file"}, "score_template is 'no-such-file'"),
        ({"score_template": "{query}"}, "each once"),
    ],
)
async def test_settings_that_cannot_work_are_refused(
    start_frontend: FrontendFactory, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await start_frontend(**settings)


def test_an_activation_that_is_not_implemented_is_refused(model_dir: Path) -> None:
    config = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}
    with pytest.raises(ConfigError, match="Tanh"):
        ScoringFacts.load(config, TextTokenizer.load(model_dir))


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_wrong_in_a_request_is_said_first(frontend: RunningFrontend, case: str) -> None:
    path, body, part = WRONG[case]
    status, error = await ask(frontend, "/v1" + path, body)
    assert status == 400
    assert part in error["message"]


async def test_another_model_is_a_404(frontend: RunningFrontend) -> None:
    status, error = await ask(frontend, "/v1/classify", {"model": "other", "input": "a"})
    assert (status, error["code"]) == (404, "model_not_found")


def test_pairs_are_each_with_each_or_one_with_all() -> None:
    assert parse(RerankBody, b'{"query": "q", "documents": ["a", {"text": "b"}]}').pairs() == [
        TextPair(first="q", second="a"),
        TextPair(first="q", second="b"),
    ]
    body = parse(ScoreBody, b'{"text_1": "q", "text_2": ["a", "b"]}')
    assert body.pairs() == [TextPair(first="q", second="a"), TextPair(first="q", second="b")]
    body = parse(ScoreBody, b'{"queries": ["q", "r"], "documents": ["a", "b"]}')
    assert body.pairs() == [TextPair(first="q", second="a"), TextPair(first="r", second="b")]
    with pytest.raises(InvalidRequest, match="1 or as many"):
        parse(ScoreBody, b'{"queries": ["q", "r"], "documents": ["a", "b", "c"]}').pairs()
