"""pagewire chat: a conversation at the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.base.options import examples
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
from pagewire.cli.talk.conversation import Conversation
from pagewire.hub.names.aliases import DEFAULT_MODEL
from pagewire.wire.chat_messages import to_chat_messages

__all__ = ["Conversation", "chat", "register"]

EXAMPLES = examples(
    "pagewire chat                                       # the default model, started here",
    "pagewire chat Qwen/Qwen3-0.6B --system 'Be brief.'  # another one, fetched if need be",
    "pagewire chat --url localhost:50051                 # a server that runs already",
    "echo 'What is 2 + 2?' | pagewire chat               # a question a line, no terminal",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("chat", epilog=EXAMPLES)(with_engine_options(chat))


def chat(
    model: Model = DEFAULT_MODEL,
    url: Url = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tools that the model may call, as OpenAI's API writes them (a JSON list). You are asked "
            "what a call returns.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    **values: Any,
) -> None:
    """Talk to a model: one started here, or one of a running server. /help lists what else can be typed."""
    sampling = sampling_params(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    offered = () if tools is None else _read_tools(tools)

    from rich.console import Console

    with connected(model, url, api_key, values) as (client, name):
        Conversation(client, name, sampling, system, Console(highlight=False), offered).run()


def _read_tools(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
        to_chat_messages([], tools=tools)
    except OSError as error:
        raise ConfigError(f"--tools {path}: cannot be read: {error.strerror}") from error
    except InvalidRequest as error:
        raise ConfigError(f"--tools {path}: {error.message}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"--tools {path}: is no JSON list of tools: {error}") from error
    return list(tools)
