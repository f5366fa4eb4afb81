"""The server under test, through the official openai SDK."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.resources import Completions
from openai.resources.chat import Completions as ChatCompletions
from openai.resources.responses import Responses
from openai.types import Completion
from openai.types.chat import ChatCompletion

SECONDS = 120.0


@dataclass(frozen=True)
class Target:
    """A server and how to call it.

    Attributes:
        root: its address, such as http://127.0.0.1:8000; the API begins at /v1 there.
        model: the name that requests use.
        directory: the model's files, where the server is the suite's own.
    """

    root: str
    model: str
    api_key: str = "unused"
    directory: Path | None = None
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        client = openai.OpenAI(
            base_url=f"{self.root}/v1", api_key=self.api_key, max_retries=0, timeout=SECONDS
        )
        object.__setattr__(self, "client", client)

    def completion(self, **fields: Any) -> Completion:
        """An answer of /v1/completions. Fields that OpenAI does not have go into the body all the same."""
        return self.client.completions.create(model=self.model, **_split(Completions, fields))

    def chat(self, **fields: Any) -> ChatCompletion:
        """An answer of /v1/chat/completions; see `completion`."""
        return self.client.chat.completions.create(model=self.model, **_split(ChatCompletions, fields))

    def response(self, **fields: Any) -> Any:
        """An answer of /v1/responses; see `completion`."""
        return self.client.responses.create(model=self.model, **_split(Responses, fields))

    def chunks(self, **fields: Any) -> list[Any]:
        """The events of a streamed answer: of a conversation if there are messages, otherwise of a text."""
        asked = {"stream": True, "stream_options": {"include_usage": True}, **fields}
        return list(self.chat(**asked) if "messages" in fields else self.completion(**asked))

    def choice(self, **fields: Any) -> Any:
        """The only choice of a greedy completion."""
        [choice] = self.completion(**{"temperature": 0, **fields}).choices
        return choice

    def reply(self, **fields: Any) -> Any:
        """The only choice of a greedy conversation."""
        [choice] = self.chat(**{"temperature": 0, **fields}).choices
        return choice

    def texts(self, each: Iterable[Mapping[str, Any]]) -> list[str]:
        """The texts of several completions that are asked for at once, each in a request of its own."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda fields: self.completion(**fields).choices[0].text, each))

    @cached_property
    def http(self) -> httpx.Client:
        """For what the SDK has no method for."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.root, timeout=SECONDS, headers=headers)

    def tokens(self, text: str) -> list[int]:
        """The ids in which the model reads a text that goes on from another."""
        return self.tokenize(prompt=text, add_special_tokens=False)

    def tokenize(self, **body: Any) -> list[int]:
        """The ids of a prompt or of messages."""
        answer = self.http.post("/tokenize", json={"model": self.model, **body})
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["tokens"]
        return tokens

    def text(self, token_ids: list[int]) -> str:
        """What /detokenize says of ids."""
        answer = self.http.post("/detokenize", json={"model": self.model, "tokens": token_ids})
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["prompt"]
        return text

    def rendered(self, **body: Any) -> str:
        """The prompt that the model reads for messages."""
        return self.text(self.tokenize(**body))


def _split(resource: Any, fields: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(resource.create).parameters
    extra = {name: value for name, value in fields.items() if name not in known}
    return {name: value for name, value in fields.items() if name in known} | {"extra_body": extra}
