"""/v1/rerank, /v1/score and /v1/classify read what other servers take, and say what model they need."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from frontend.http.body import parse
from frontend.http.scoring.bodies import RerankBody, ScoreBody
from frontend.pooled import TextPair
from pagewire.base.errors import InvalidRequest
from tests.unit.frontend.conftest import RunningFrontend

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
