"""What fields mean that are left out: for every endpoint of OpenAI's as its specification has it.

The values are those of https://github.com/openai/openai-openapi and of the official client's documentation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.embedding_create_params import EmbeddingCreateParams as EmbeddingParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams

from frontend.http.apis import ENDPOINTS
from frontend.http.openai.schemas.chat import ChatCompletionBody
from frontend.http.openai.schemas.completion import CompletionBody
from frontend.http.openai.schemas.embeddings import EmbeddingBody
from frontend.http.openai.schemas.responses import ResponsesBody
from frontend.http.openapi import openapi_document
from tests.unit.frontend.conftest import RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler


@dataclass(frozen=True)
class Default:
    """One field.

    Attributes:
        specified: OpenAI's default; None for none.
        ours: what this server does, where that is something else.
        why: the reason for it.
    """

    specified: object
    ours: object = None
    why: str = ""


NONE = Default(None)
TIER = Default("auto")
SAMPLING = {
    "temperature": Default(1),
    "top_p": Default(1),
    "presence_penalty": Default(0),
    "frequency_penalty": Default(0),
}
HINTS = dict.fromkeys(
    ("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"),
    NONE,
)
COMPLETIONS = {
    **SAMPLING,
    "best_of": Default(1, None, "as many as n: 1 would contradict a larger n"),
    "echo": Default(False),
    "logit_bias": NONE,
    "logprobs": NONE,
    "max_tokens": Default(16),
    "n": Default(1),
    "seed": NONE,
    "stop": NONE,
    "stream": Default(False),
    "stream_options": NONE,
    "user": NONE,
}
CHAT = {
    **SAMPLING,
    **HINTS,
    "logit_bias": NONE,
    "logprobs": Default(False),
    "max_completion_tokens": NONE,
    "max_tokens": NONE,
    "n": Default(1),
    "parallel_tool_calls": Default(True),
    "reasoning_effort": Default("medium", None, "as the model's template has it"),
    "response_format": Default({"type": "text"}),
    "seed": NONE,
    "service_tier": TIER,
    "stop": NONE,
    "store": Default(False),
    "stream": Default(False),
    "stream_options": NONE,
    "tool_choice": Default("auto"),
    "tools": NONE,
    "top_logprobs": NONE,
    "user": NONE,
    "verbosity": Default("medium"),
}
RESPONSES = {
    **HINTS,
    "temperature": Default(1),
    "top_p": Default(1),
    "background": Default(False),
    "conversation": NONE,
    "include": NONE,
    "instructions": NONE,
    "max_output_tokens": NONE,
    "max_tool_calls": NONE,
    "parallel_tool_calls": Default(True),
    "previous_response_id": NONE,
    "prompt": NONE,
    "reasoning": Default({"effort": "medium"}, None, "as the model's template has it"),
    "service_tier": TIER,
    "store": Default(True, False, "nothing is stored"),
    "stream": Default(False),
    "stream_options": NONE,
    "text": Default({"format": {"type": "text"}, "verbosity": "medium"}),
    "tool_choice": Default("auto"),
    "tools": NONE,
    "top_logprobs": NONE,
    "truncation": Default("disabled"),
    "user": NONE,
}
EMBEDDINGS = {"dimensions": NONE, "encoding_format": Default("float"), "user": NONE}

MESSAGES = [{"role": "user", "content": "hi"}]
ENDPOINT_TABLES: dict[str, tuple[Mapping[str, Default], type, type, dict[str, Any]]] = {
    "/v1/completions": (COMPLETIONS, TextParams, CompletionBody, {"prompt": "p"}),
    "/v1/chat/completions": (CHAT, ChatParams, ChatCompletionBody, {"messages": MESSAGES}),
    "/v1/responses": (RESPONSES, ResponseParams, ResponsesBody, {"input": "hi"}),
    "/v1/embeddings": (EMBEDDINGS, EmbeddingParams, EmbeddingBody, {"input": "a", "pooling": "mean"}),
}


@pytest.mark.parametrize("path", ENDPOINT_TABLES)
def test_every_field_of_openais_that_is_served_is_in_the_table(path: str) -> None:
    table, theirs, ours, body = ENDPOINT_TABLES[path]
    served = set(ours.model_fields) & {*theirs.__annotations__, "stream"}
    assert served - {"model", *body} == set(table)


@pytest.mark.parametrize("path", ENDPOINT_TABLES)
def test_the_document_tells_the_defaults(path: str) -> None:
    document = json.loads(json.dumps(openapi_document(ENDPOINTS, with_keys=False)))
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    table = ENDPOINT_TABLES[path][0]
    told = {name: schema["properties"][name].get("default") for name in table}
    assert told == {name: row.ours if row.why else row.specified for name, row in table.items()}


@pytest.fixture
async def http(frontend: RunningFrontend, scheduler: ScriptedScheduler):
    scheduler.reply = b"a reply that is longer than sixteen tokens"
    scheduler.pool = lambda submit: [1, 2, 3, 4]
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


@pytest.mark.parametrize("path", ENDPOINT_TABLES)
async def test_a_field_left_out_or_null_means_its_default(http, scheduler, path: str) -> None:
    table, _, _, body = ENDPOINT_TABLES[path]

    async def answer(fields: dict[str, object]) -> tuple[object, object]:
        async with http.post(path, json={**body, **fields}) as response:
            said = await response.json()
            assert response.status == 200, said
        submit = scheduler.submits[-1]
        submit.ClearField("handle")
        submit.ClearField("request_id")
        submit.ClearField("received")
        submit.sampling.ClearField("seed")
        return submit, without_ids(said)

    expected = await answer({})
    for name, row in table.items():
        value = row.ours if row.why else row.specified
        if name not in ("tool_choice", "best_of"):  # of which one needs tools, the other ranks
            assert await answer({name: value}) == expected, name
        assert await answer({name: None}) == expected, name


def without_ids(value: Any) -> Any:
    """An answer without what differs from one to the next."""
    if isinstance(value, dict):
        volatile = ("id", "created", "created_at", "completed_at")
        return {key: without_ids(each) for key, each in value.items() if key not in volatile}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


async def test_only_texts_have_a_limit_of_their_own(http, scheduler: ScriptedScheduler) -> None:
    for path, limit in (("/v1/completions", 16), ("/v1/chat/completions", 181), ("/v1/responses", 181)):
        async with http.post(path, json=ENDPOINT_TABLES[path][3]) as response:
            assert response.status == 200
        assert scheduler.submits[-1].sampling.max_tokens == limit, path
