"""/openapi.json tells of everything that is served, and answers are as it says."""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
import jsonschema
import pydantic
import pytest

from frontend.http.apis import ENDPOINTS
from frontend.http.bounds import SAMPLING_BOUNDS
from frontend.http.endpoint import Endpoint
from frontend.http.openapi import openapi_document
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import SamplingParams
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

# pydantic before 2.12 can't be told at validation.
FORBIDDING: dict[str, Any] = {} if pydantic.VERSION.startswith(("2.10", "2.11")) else {"extra": "forbid"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(json.dumps(openapi_document(ENDPOINTS, with_keys=False)))


@pytest.fixture
async def http(frontend: RunningFrontend, scheduler: ScriptedScheduler):
    scheduler.reply = b"x"
    scheduler.pool = lambda submit: [1, 2, 3, 4]
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


@pytest.fixture
async def classifier(scheduler: ScriptedScheduler, start_frontend: FrontendFactory):
    scheduler.task, scheduler.labels = "classify", ["relevant"]
    scheduler.pool = lambda submit: [0.5]
    frontend = await start_frontend()
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


def check(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_document_is_complete_in_itself(document) -> None:
    assert document["openapi"] == "3.1.0"
    for reference in references(document):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", SAMPLING_BOUNDS)
def test_bounds_of_sampling_fields_are_those_that_are_checked(name: str) -> None:
    bounds = SAMPLING_BOUNDS[name]
    further = {"best_of": {"n": 1}, "min_tokens": {}}.get(name, {})
    for bound in ("minimum", "maximum"):
        if bound in bounds:
            value = bounds[bound]
            SamplingParams(**{name: value, **further})
            outside = value + (1 if bound == "maximum" else -1)
            with pytest.raises(InvalidRequest):
                SamplingParams(**{name: outside, **further})
    if "exclusiveMinimum" in bounds:
        with pytest.raises(InvalidRequest):
            SamplingParams(**{name: bounds["exclusiveMinimum"]})


def filled(path: str) -> str:
    """A path of what there is: the model has the version 1."""
    return re.sub(r"{\w+}", "bytes", path.replace("{version}", "1"))


async def test_every_route_is_in_the_document(frontend: RunningFrontend, document) -> None:
    served = {
        (route.method, route.resource.canonical)
        for route in frontend.http._runner.app.router.routes()
        if route.method != "HEAD"
    }
    told = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert served == told


def test_bodies_refuse_what_they_do_not_name(document) -> None:
    for path in ("/v1/chat/completions", "/v1/responses", "/tokenize"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        with pytest.raises(jsonschema.ValidationError, match="foo"):
            check(document, body, {"input": "a", "messages": [], "foo": 1})


async def test_examples_are_answered_as_the_document_says(http, document) -> None:
    """No further field is told than those of the document, so it misses none."""
    await check_examples(http, document, [each for each in ENDPOINTS if each.tag != "Scoring"])


async def test_examples_for_classifiers_are_answered_as_the_document_says(classifier, document) -> None:
    await check_examples(classifier, document, [each for each in ENDPOINTS if each.tag == "Scoring"])


async def check_examples(
    http: aiohttp.ClientSession, document: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    for endpoint in endpoints:
        if endpoint.body is None or endpoint.answer is None:
            continue
        operation = document["paths"][endpoint.path]["post"]
        body = operation["requestBody"]["content"]["application/json"]
        example = {**body["example"]}
        if endpoint.name == "detokenize":
            example["tokens"] = [104]
        check(document, body["schema"], example)
        answers = operation["responses"]["200"]["content"]
        async with http.post(filled(endpoint.path), json=example) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert response.content_type == "application/json"
        check(document, answers["application/json"]["schema"], answer)
        endpoint.answer.model_validate(answer, strict=True, **FORBIDDING)
        if endpoint.event is None:
            continue
        async with http.post(endpoint.path, json={**example, "stream": True}) as response:
            assert response.content_type == endpoint.event_media_type
            streamed = (await response.text()).strip()
        schema = answers[endpoint.event_media_type]["schema"]
        if endpoint.event_media_type == "application/x-ndjson":
            for line in streamed.splitlines():
                check(document, schema, json.loads(line))
                endpoint.event.model_validate_json(line, strict=True, **FORBIDDING)
        else:
            frames = streamed.split("\n\n")
            for frame in frames:
                event = dict(line.split(": ", 1) for line in frame.splitlines())
                check(document, schema, event)
                if event["data"] != "[DONE]":
                    data = schema["properties"]["data"]["contentSchema"]
                    check(document, data, json.loads(event["data"]))


async def test_questions_are_answered_as_the_document_says(http, document) -> None:
    for endpoint in ENDPOINTS:
        if endpoint.method != "GET":
            continue
        answers = document["paths"][endpoint.path]["get"]["responses"]
        async with http.get(filled(endpoint.path)) as response:
            told = answers[str(response.status)]
            if "$ref" in told:
                told = document["components"]["responses"][told["$ref"].rpartition("/")[2]]
            [(media_type, content)] = told["content"].items()
            assert response.content_type == media_type, endpoint.path
            if media_type == "application/json":
                check(document, content["schema"], await response.json())


@pytest.mark.parametrize("keys", [(), ("key",)])
async def test_document_and_page_need_no_key_and_say_whether_others_do(
    start_frontend: FrontendFactory, keys: tuple[str, ...]
) -> None:
    frontend = await start_frontend(api_keys=keys)
    async with aiohttp.ClientSession(frontend.url) as session:
        async with session.get("/openapi.json") as response:
            document = await response.json()
        async with session.get("/docs") as response:
            page = await response.text()
        paths = document["paths"]
        for endpoint in ENDPOINTS:
            if endpoint.method == "GET" and endpoint.name != "getResponse":
                path = filled(endpoint.path)
                async with session.get(path) as response:
                    open_to_all = (
                        paths[endpoint.path]["get"].get("security") == [] or {} in document["security"]
                    )
                    assert (response.status != 401) == open_to_all, path
    assert ({} in document["security"]) == (not keys)
    assert "openapi.json" in page
    assert "http://" not in page
    assert "https://" not in page


async def test_tokenize_tells_tokens_as_the_vocabulary_has_them(http) -> None:
    async with http.post("/tokenize", json={"prompt": "é x", "return_token_strs": True}) as response:
        answer = await response.json()
    assert answer["token_strs"] == ["Ã", "©", "Ġ", "x"]
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == ([195, 169, 32, 120], 4, 200)


async def test_load_and_server_info_tell_of_the_scheduler(http) -> None:
    async with http.get("/load") as response:
        load = await response.json()
        assert (load["server_load"], load["num_requests_running"], load["kv_cache_usage"]) == (3, 3, 0.25)
    async with http.get("/server_info") as response:
        info = await response.json()
        assert (info["served_model_names"], info["ready"], info["pooling"]) == (["bytes"], True, None)
        assert info["engine"]["max_model_len"] == 200
        assert info["limits"]["max_body_bytes"] == 8 * 1024 * 1024
