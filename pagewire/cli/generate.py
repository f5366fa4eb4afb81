"""pagewire generate: one completion to standard output."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

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

EXAMPLES = examples(
    "pagewire generate smollm2-135m 'Once upon a time' --max-tokens 32",
    "pagewire generate smollm2-135m - --url localhost:50051 < prompt.txt",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("generate", epilog=EXAMPLES)(with_engine_options(generate))


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to continue; - reads standard input.")
    ],
    url: Url = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output when it appears.")] = None,
    **values: Any,
) -> None:
    """Continue a text, on standard output as it is generated."""
    sampling = sampling_params(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or None
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected(model, url, api_key, values) as (client, name):
        for event in client.generate(text, sampling, model=name, stream=True):
            print(event.text, end="", flush=True)
    print()
