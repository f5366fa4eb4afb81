"""What a request may be large in is bounded, and refused before much is made of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import aiohttp
import pytest

from frontend.generation.request import MAX_CHOICES
from frontend.grpc.conversation import read_conversation
from frontend.http.body import MAX_NESTED, MAX_VALUES, Body, parse
from frontend.http.openai.schemas.chat import ChatCompletionBody
from frontend.http.openai.schemas.completion import CompletionBody
from frontend.http.openai.schemas.embeddings import EmbeddingBody
from frontend.http.openai.schemas.responses import ResponsesBody
from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2
from tests.unit.frontend.conftest import FrontendFactory
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

MANY = 200_000
TURN = {"role": "user", "content": ""}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionBody, {"messages": [TURN] * MANY}),
        (ChatCompletionBody, {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]}),
        (ChatCompletionBody, {"messages": [TURN], "tools": [{"type": "function"}] * MANY}),
        (ChatCompletionBody, {"messages": [TURN], "documents": [{}] * MANY}),
        (CompletionBody, {"prompt": [[]] * MANY}),
        (EmbeddingBody, {"input": [[1]] * MANY}),
        (ResponsesBody, {"input": [TURN] * MANY}),
    ],
    ids=["messages", "parts", "tools", "documents", "prompts", "inputs", "items"],
)
def test_a_body_of_very_many_objects_is_refused_unread(kind: type[Body], body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"objects and lists; at most {MAX_NESTED} are taken"):
        parse(kind, json.dumps(body).encode())


def test_a_body_of_very_many_values_is_refused_unread() -> None:
    with pytest.raises(InvalidRequest, match=f"values; at most {MAX_VALUES} are taken"):
        parse(CompletionBody, json.dumps({"prompt": [1] * (MAX_VALUES + 2)}).encode())


def test_texts_may_have_any_characters_in_them() -> None:
    text = '{"[,]\\"}' * MANY
    body = parse(ChatCompletionBody, json.dumps({"messages": [{"role": "user", "content": text}]}).encode())
    assert body.prompt_to_continue().messages[0]["content"] == text  # type: ignore[union-attr]


def test_lists_of_prompts_are_refused_before_anything_is_made_of_their_entries() -> None:
    body = parse(CompletionBody, json.dumps({"prompt": ["a"] * (MAX_CHOICES + 1)}).encode())
    with pytest.raises(InvalidRequest, match=f"prompt has {MAX_CHOICES + 1} entries; at most {MAX_CHOICES}"):
        body.prompts_to_continue()
    messages = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user")] * 5000)
    with pytest.raises(InvalidRequest, match="messages has 5000 entries; at most 4096 are taken"):
        read_conversation(messages)


CANARY = "/tmp/pagewire-canary/../pagewire-canary/file.jinja"
OPENED: list[str] = []


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed again."""
    if event in ("open", "os.listdir", "os.scandir", "import") and "pagewire-canary" in str(arguments[:1]):
        OPENED.append(f"{event} {arguments[0]}")


async def test_no_field_of_a_request_names_a_file_that_is_opened(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"done"
    frontend = await start_frontend(trust_request_chat_template=True)
    sys.addaudithook(note_opened)
    with pytest.raises(FileNotFoundError):
        open(CANARY)  # noqa: ASYNC230, SIM115 (the hook hears of it)
    assert OPENED
    OPENED.clear()
    messages = [{"role": "user", "content": CANARY}]
    image = [{"type": "image_url", "image_url": {"url": f"file://{CANARY}"}}]
    function = {"name": "f", "description": CANARY, "parameters": {"$ref": f"file://{CANARY}"}}
    schema = {"name": "s", "schema": {"$ref": f"file://{CANARY}"}}
    chats: list[dict[str, Any]] = [
        {"model": CANARY},
        {"chat_template": CANARY},
        {"chat_template": f"{{% include '{CANARY}' %}}{{% import '{CANARY}' as x %}}"},
        {"chat_template_kwargs": {"chat_template": CANARY, "a": CANARY}},
        {"messages": [{"role": "user", "content": image}]},
        {"messages": [{"role": CANARY, "content": CANARY, "name": CANARY}]},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"structured_outputs": {"grammar": f"%import {CANARY}"}, "documents": [{"path": CANARY}]},
        {"user": CANARY, "cache_salt": CANARY, "request_id": CANARY, "stop": [CANARY], "tool_parser": CANARY},
    ]
    async with aiohttp.ClientSession(frontend.url) as session:
        for fields in chats:
            body = {"messages": messages, "max_tokens": 4, **fields}
            async with session.post("/v1/chat/completions", json=body) as response:
                assert response.status in (200, 400, 404), await response.text()
        for path in (f"/v1/models/{CANARY}", "/docs/../../../../etc/passwd", f"/docs/{CANARY}"):
            async with session.get(path) as response:
                assert response.status == 404
    assert OPENED == []
