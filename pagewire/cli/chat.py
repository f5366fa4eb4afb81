"""pagewire chat: a conversation at the terminal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagewire.base.errors import PagewireError
from pagewire.cli.arguments import (
    ApiKey,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    Url,
    connected,
    sampling_params,
    with_engine_options,
)
from pagewire.hub.names.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from pagewire.client import Client

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
PROMPT = "> "


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("chat")(with_engine_options(chat))


def chat(
    model: Model = DEFAULT_MODEL,
    url: Url = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    **values: Any,
) -> None:
    """Talk to a model: one started here, or one of a running server."""
    sampling = sampling_params(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )

    from rich.console import Console

    with connected(model, url, api_key, values) as (client, name):
        Conversation(client, name, sampling, system, Console(highlight=False)).run()


class Conversation:
    """A conversation between standard input and a model.

    Attributes:
        messages: what was said so far. An answer that was stopped stays as far as it came; one that failed
            is taken back together with its question.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        sampling: Mapping[str, Any],
        system: str | None,
        console: Console,
    ) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._console = console
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def run(self) -> None:
        """Reads and answers until /exit, the end of the input, or Ctrl-C at the prompt."""
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):  # line editing, where Python has it
                importlib.import_module("readline")
            self._console.print(HELP, style="dim")
        while True:
            try:
                line = input(PROMPT if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                if interactive:
                    self._console.print()
                return
            if line == "/exit":
                return
            if line == "/clear":
                self.messages = list(self._opening)
            elif line.startswith("/"):
                self._console.print(f"unknown command {line}: {HELP}", style="dim", markup=False)
            elif line:
                self.answer(line)

    def answer(self, question: str) -> None:
        """Streams the answer to the terminal and keeps both in the conversation."""
        self.messages.append({"role": "user", "content": question})
        events = self._client.generate(
            messages=self.messages, sampling_params=self._sampling, model=self._model, stream=True
        )
        parts: list[str] = []
        try:
            for event in events:
                parts.append(event.text)
                self._console.print(event.text, end="", style="green", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            self._console.print(" [stopped]", style="dim", end="", markup=False)
        except PagewireError as error:
            self.messages.pop()
            self._console.print(f"error: {error.message}", style="red", markup=False, soft_wrap=True)
            return
        self._console.print()
        self.messages.append({"role": "assistant", "content": "".join(parts)})
