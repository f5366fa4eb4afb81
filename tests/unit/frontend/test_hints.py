"""Fields that ask for nothing an answer shows are taken; unknown ones only where the operator allows them."""

from __future__ import annotations

import logging
from typing import Any

import aiohttp
import pytest

from frontend.http import body as bodies
from tests.unit.frontend.conftest import FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler
from tests.unit.frontend.test_http import post

EPHEMERAL = {"type": "ephemeral"}
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "p"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
}
HINTS: list[dict[str, Any]] = [
    {"metadata": {"trace": "1"}},
    {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}},
    {"safety_identifier": "s", "user": "u"},
    *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority", "fast")),
    {"store": False},
    {"store": True},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
]
CHAT_HINTS: list[dict[str, Any]] = [
    {"verbosity": "low"},
    {"reasoning_effort": "minimal"},
    {"logprobs": False, "top_logprobs": 0},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": EPHEMERAL}]}]},
    {"messages": [{"role": "system", "content": "a", "cache_control": EPHEMERAL}, *MESSAGES]},
    {"tools": [], "functions": [], "function_call": "auto", "tool_choice": "auto"},
]


def function(**fields: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}, "cache_control": EPHEMERAL}


TOOLS = [function(), function(parameters={}), function(parameters=None), function(cache_control=EPHEMERAL)]


@pytest.fixture
async def http(frontend: RunningFrontend, scheduler: ScriptedScheduler):
    scheduler.reply = b"x"
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


async def test_hints_are_taken_by_every_endpoint(http, scheduler: ScriptedScheduler) -> None:
    for path, body in BODIES.items():
        hints = [*HINTS, *(CHAT_HINTS if "chat" in path else [])]
        hints += [{"text": {"verbosity": "high"}}] if "responses" in path else []
        for hint in hints:
            async with http.post(path, json={**body, **hint}) as response:
                assert response.status == 200, (path, hint, await response.text())


async def test_a_function_without_parameters_has_an_empty_list_of_them(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    """Templates go through a function's parameters, whether it has some or not."""
    scheduler.reply, scheduler.max_model_len = b"x", 2000
    shown_tool = "{{ t | tojson }}{{ t.function.parameters.properties.items() | list }}"
    source = f"{{% for t in tools %}}{shown_tool}{{% endfor %}}"
    frontend = await start_frontend(chat_template=source, tool_call_parser="hermes")
    async with aiohttp.ClientSession(frontend.url) as http:
        for tool in TOOLS:
            body = {"messages": MESSAGES, "tools": [tool]}
            status, answer = await post(http, "/v1/chat/completions", body)
            assert status == 200, answer
    shown = '{"name": "f", "parameters": {"type": "object", "properties": {}}}'
    prompts = {bytes(submit.token_ids).decode() for submit in scheduler.submits}
    assert prompts == {f'{{"type": "function", "function": {shown}}}[]'}


@pytest.mark.parametrize(
    ("effort", "shown"), [(None, "--"), ("low", "low-"), ("none", "none-False")], ids=str
)
async def test_effort_reaches_templates_that_have_a_variable_for_it(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler, effort: str | None, shown: str
) -> None:
    scheduler.reply = b"x"
    source = "{{ reasoning_effort or '-' }}-{{ enable_thinking }}"
    frontend = await start_frontend(chat_template=source)
    async with aiohttp.ClientSession(frontend.url) as http:
        fields: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        await post(http, "/v1/chat/completions", {"messages": MESSAGES, **fields})
        await post(http, "/v1/responses", {"input": "hi", "reasoning": {"effort": effort}})
    assert [bytes(submit.token_ids).decode() for submit in scheduler.submits] == [shown] * 2


async def test_what_is_asked_of_a_store_that_is_not_there_is_refused(http) -> None:
    for fields in ({"previous_response_id": "r"}, {"background": True}, {"conversation": "c"}):
        status, _ = await post(http, "/v1/responses", {"input": "hi", "store": True, **fields})
        assert status == 400
    status, answer = await post(http, "/v1/responses", {"input": "hi", "store": True})
    assert (status, answer["store"]) == (200, False)


async def test_unknown_fields_are_let_by_on_request_and_logged_once(
    start_frontend: FrontendFactory,
    scheduler: ScriptedScheduler,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler.reply = b"x"
    monkeypatch.setattr(bodies, "_names_logged", set())
    monkeypatch.setattr(bodies, "_MAX_NAMES_LOGGED", 3)
    lenient, strict = await start_frontend(allow_unknown_fields=True), await start_frontend()
    unknown = {"messages": [{**MESSAGES[0], "baz\n": 1}], "foo": {"a": 1}}
    with caplog.at_level(logging.WARNING, "frontend.http.body"):
        async with aiohttp.ClientSession(lenient.url) as http:
            for _ in range(2):
                assert (await post(http, "/v1/chat/completions", unknown))[0] == 200
            many = {f"field_{number}": 1 for number in range(9)}
            assert (await post(http, "/v1/completions", {"prompt": "p", **many}))[0] == 200
            suffix = await post(http, "/v1/completions", {"prompt": "p", "suffix": "s"})
            assert suffix[1]["error"]["code"] == "unsupported_parameter"
        async with aiohttp.ClientSession(strict.url) as http:
            status, answer = await post(http, "/v1/chat/completions", unknown)
            assert (status, answer["error"]["param"]) == (400, "foo")
    lines = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert lines == ["ChatCompletionBody.'foo'", "Message.'baz\\n'", "CompletionBody.'field_0'"]
