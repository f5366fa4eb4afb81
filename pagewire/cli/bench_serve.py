"""pagewire bench serve: load on a server, and what its clients see of it."""

from __future__ import annotations

import json as json_format
import math
import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths

if TYPE_CHECKING:
    from pagewire.bench.serve.datasets import Dataset
    from pagewire.bench.serve.sweep import Sweep

DATASETS = ("random", "sharegpt-like", "sharegpt", "prefix", "trace")
DEFAULT_NUM_REQUESTS, DEFAULT_INPUT, DEFAULT_OUTPUT = 256, "512", "128"
DEFAULT_PREFIX_LEN = 512
MAX_COLUMNS = 250

Url = Annotated[
    str,
    typer.Option(
        "--url",  # typer 0.27 would take it from a metavar that differs only in case: --URL
        metavar="URL",
        help="The server: http(s)://HOST:PORT, or grpc(s)://HOST:PORT for pagewire's gRPC.",
    ),
]
WorkloadName = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="NAME",
        help="Random requests and a load with a name: burst (512 x 256/256, all at once), closed64 "
        "(256 x 512/128, 64 at a time) or rate8 (256 x 512/256, 8 per second). Other options change it.",
    ),
]
DatasetName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="random: random tokens; prefix: the same behind prefixes that requests share; sharegpt-like: "
        "random tokens in lengths like ShareGPT's; sharegpt: conversations of the file --dataset-path; "
        "trace: the lengths, times and shared blocks of the file --dataset-path.",
    ),
]
DatasetPath = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="For sharegpt a JSON file of conversations; for trace JSON lines of timestamp (ms), "
        "input_length, output_length and hash_ids, or a .csv file of TIMESTAMP, ContextTokens and "
        "GeneratedTokens.",
    ),
]
InputLen = Annotated[
    str | None,
    typer.Option(metavar="N[:M]", help="Prompt tokens, all N or uniformly N to M.  [default: 512]"),
]
OutputLen = Annotated[
    str | None, typer.Option(metavar="N[:M]", help="Output tokens, likewise.  [default: 128]")
]
PrefixLen = Annotated[
    int | None,
    typer.Option(min=1, help="For prefix: tokens of a prefix, before a prompt's own.  [default: 512]"),
]
NumPrefixes = Annotated[int, typer.Option(min=1, help="For prefix: how many there are.")]
Speed = Annotated[float, typer.Option(help="For trace: how many times as fast it is replayed.")]
VocabSize = Annotated[
    int, typer.Option(min=1, help="Random token ids are smaller than this; choose one of the model's.")
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Send text, of this model's tokens, instead of token ids: a tokenizer.json or its directory, "
        "a Hugging Face id or an alias.",
    ),
]
Text = Annotated[
    bool, typer.Option("--text", help="Send text instead of token ids; without --tokenizer, of common words.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions, with text.")]
Rate = Annotated[
    str | None,
    typer.Option(
        metavar="R[,R...]",
        help="Requests a second, at random times (a Poisson process), or inf; each of several is measured.",
    ),
]
Concurrency = Annotated[
    str | None,
    typer.Option(metavar="N[,N...]", help="The most requests open at once; each of several is measured."),
]
Burstiness = Annotated[
    float, typer.Option(help="Of the times between requests: below 1 they come in bursts, above more evenly.")
]
NumRequests = Annotated[
    int | None, typer.Option(min=1, help="Requests of each point.  [default: 256, or the whole file]")
]
Duration = Annotated[float | None, typer.Option(help="Seconds of each point in which requests are sent.")]
Warmup = Annotated[int, typer.Option(min=0, help="Requests before the first point; they are not measured.")]
Seed = Annotated[int, typer.Option(help="Of lengths and times; contents are always new.")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that the load generator spreads over.  [default: 1; over gRPC as many as the load "
        "needs, at most one for each core]",
    ),
]
Connections = Annotated[int, typer.Option(min=1, help="Over gRPC: connections of each process.")]
Slo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEASURE=MS",
        help="Count requests within it as goodput: ttft, tpot, itl (the longest gap), e2e. May be repeated.",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", dir_okay=False, help="Write everything here, after each point what is known so far."
    ),
]
SaveRequests = Annotated[
    bool, typer.Option("--save-requests", help="Write an entry for each request to --json, too.")
]
Picture = Annotated[
    Path | None,
    typer.Option(dir_okay=False, metavar="FILE.svg", help="Draw throughput against latency here."),
]
ModelName = Annotated[
    str | None, typer.Option(help="The model to ask for.  [default: the first that the server lists]")
]
ApiKey = Annotated[str | None, typer.Option(envvar="PAGEWIRE_API_KEY", help="Key to send.", show_envvar=True)]
Header = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME: VALUE", help="A header (over gRPC: metadata) of every request. May be repeated."
    ),
]
ExtraBody = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="Fields for every request's body; null leaves one of ours out."),
]
Temperature = Annotated[float, typer.Option(help="Of the sampling.")]
IgnoreEos = Annotated[
    bool, typer.Option(help="Ask for outputs of exactly the length chosen; not every server knows how.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request has failed.")]
CaFile = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Certificates to trust instead of the system's.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """The options that say what is asked and when, with a preset's values filled in."""

    dataset: str
    dataset_path: Path | None
    input_len: str | None
    output_len: str | None
    prefix_len: int | None
    num_prefixes: int
    speed: float
    vocab_size: int
    tokenizer: str | None
    text: bool
    rate: str | None
    concurrency: str | None
    burstiness: float
    num_requests: int | None
    duration: float | None
    seed: int

    @property
    def uses_trace(self) -> bool:
        """Whether requests come when the trace says."""
        return self.dataset == "trace" and self.rate is None and self.concurrency is None


EXAMPLES = (
    "pagewire bench serve --url http://localhost:8000 --rate 1,2,4",
    "pagewire bench serve --url grpc://localhost:50051 --rate 2",
)


def serve(
    url: Url,
    workload: WorkloadName = None,
    dataset: DatasetName = "random",
    dataset_path: DatasetPath = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    prefix_len: PrefixLen = None,
    num_prefixes: NumPrefixes = 1,
    speed: Speed = 1.0,
    vocab_size: VocabSize = 32_000,
    tokenizer: TokenizerName = None,
    text: Text = False,
    chat: Chat = False,
    rate: Rate = None,
    concurrency: Concurrency = None,
    burstiness: Burstiness = 1.0,
    num_requests: NumRequests = None,
    duration: Duration = None,
    warmup: Warmup = 1,
    seed: Seed = 0,
    processes: Processes = None,
    connections: Connections = 4,
    slo: Slo = None,
    json: Json = None,
    save_requests: SaveRequests = False,
    picture: Picture = None,
    model: ModelName = None,
    api_key: ApiKey = None,
    header: Header = None,
    extra_body: ExtraBody = None,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = True,
    timeout: Timeout = 600.0,
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Load any OpenAI-compatible server, or pagewire's gRPC, and measure what its clients see.

    Without --rate and --concurrency all requests are sent at once. Several rates or concurrencies are
    measured one after another.
    """
    from pagewire.bench.serve.metrics import Objectives
    from pagewire.bench.serve.sweep import Sweep

    if save_requests and json is None:
        raise ConfigError("--save-requests belongs to --json, which is where they go", param="save_requests")
    target = Target(
        url=url,
        model=model or "",
        chat=chat,
        headers=_headers(header or [], api_key),
        timeout=timeout,
        ca_file=ca_file,
        insecure=insecure,
        temperature=temperature,
        ignore_eos=ignore_eos,
        extra_body=_extra_body(extra_body),
        connections=connections,
    )
    choices = _with_preset(
        workload,
        _Choices(
            dataset=dataset,
            dataset_path=dataset_path,
            input_len=input_len,
            output_len=output_len,
            prefix_len=prefix_len,
            num_prefixes=num_prefixes,
            speed=speed,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            text=text or chat,
            rate=rate,
            concurrency=concurrency,
            burstiness=burstiness,
            num_requests=num_requests,
            duration=duration,
            seed=seed,
        ),
    )
    chosen = replace(_dataset(choices), contents=secrets.token_hex(8))
    sweep = Sweep(
        dataset=chosen,
        loads=_loads(choices, chosen.size),
        uses_trace=choices.uses_trace,
        warmup=warmup,
        objectives=Objectives.parse(slo or []),
        save_requests=save_requests,
    )
    _run(target, sweep, processes, json, picture)


def _run(
    target: Target, sweep: Sweep, processes: int | None, json: Path | None, picture: Path | None
) -> None:
    """Measures, and reports each point as soon as it is done."""
    from rich.console import Console

    from pagewire.bench.record import describe_run, write_record
    from pagewire.bench.serve.generator import Generator, SpreadGenerator, suitable_processes
    from pagewire.bench.serve.picture import picture as draw
    from pagewire.bench.serve.tables import latency_table, point_lines, sweep_table

    console = Console(highlight=False, width=MAX_COLUMNS)
    results: list[dict[str, Any]] = []
    processes = processes or suitable_processes(target, sweep.loads)
    with SpreadGenerator(target, processes) if processes > 1 else Generator(target) as generator:
        if not target.model:
            target = replace(target, model=generator.first_model())
            generator.use_model(target.model)
        about = {**describe_run("serve"), "target": _shown(target), "dataset": str(sweep.dataset)}
        about["command"] = _without_secrets(about["command"], target)
        title = f"{target.model} at {target.url}, {sweep.dataset}"
        print(title, file=sys.stderr, flush=True)

        def report(result: dict[str, Any]) -> None:
            results.append(result)
            for line in point_lines(result):
                print(line, flush=True)
            console.print(latency_table(result))
            if json is not None:
                write_record(json, {**about, "results": results})
            if picture is not None:
                picture.write_text(draw(results, title), encoding="utf-8")

        interrupted = sweep.run(generator, report, lambda load: print(f"\n{load}", flush=True))
    if len(results) > 1:
        print()
        console.print(sweep_table(results))
    if interrupted:
        raise typer.Exit(130)
    if not any(result["requests"]["complete"] for result in results):
        raise typer.Exit(1)


def _with_preset(name: str | None, choices: _Choices) -> _Choices:
    """The options with a preset's values where none are given."""
    from pagewire.bench.serve.sweep import PRESETS

    if name is None:
        return choices
    preset = PRESETS.get(name)
    if preset is None:
        raise ConfigError(f"workload is {name!r}; it must be one of {', '.join(PRESETS)}", param="workload")
    if choices.dataset != "random":
        raise ConfigError(f"--workload {name} has random requests; leave --dataset out", param="dataset")
    own_load = choices.rate is not None or choices.concurrency is not None
    own_end = choices.num_requests is not None or choices.duration is not None
    return replace(
        choices,
        input_len=choices.input_len or preset.input_len,
        output_len=choices.output_len or preset.output_len,
        num_requests=choices.num_requests if own_end else preset.num_requests,
        rate=choices.rate if own_load else preset.rate,
        concurrency=choices.concurrency if own_load else preset.concurrency,
    )


def _dataset(choices: _Choices) -> Dataset:
    from pagewire.bench.serve.dataset_files import read_conversations, read_trace
    from pagewire.bench.serve.datasets import RandomDataset, ShareGptLike

    _check_dataset(choices)
    name, path, seed = choices.dataset, choices.dataset_path, choices.seed
    maker = _maker(choices, "text" if choices.text or choices.tokenizer or name == "sharegpt" else "ids")
    if path is not None:
        if name == "trace":
            return read_trace(path, maker, seed, choices.speed)
        return read_conversations(path, maker, seed)
    if name == "sharegpt-like":
        return ShareGptLike(maker=maker, seed=seed)
    return RandomDataset(
        maker=maker,
        seed=seed,
        input=Lengths.parse(choices.input_len or DEFAULT_INPUT, "input-len"),
        output=Lengths.parse(choices.output_len or DEFAULT_OUTPUT, "output-len"),
        prefix_len=(choices.prefix_len or DEFAULT_PREFIX_LEN) if name == "prefix" else 0,
        num_prefixes=choices.num_prefixes,
    )


def _check_dataset(choices: _Choices) -> None:
    """Refuses options that would change nothing: who gives one believes that it does."""
    name = choices.dataset
    if name not in DATASETS:
        raise ConfigError(f"dataset is {name!r}; it must be one of {', '.join(DATASETS)}", param="dataset")
    if (name in ("sharegpt", "trace")) != (choices.dataset_path is not None):
        raise ConfigError(
            "--dataset-path belongs to the datasets sharegpt and trace, which need it", param="dataset_path"
        )
    has_lengths = choices.input_len is not None or choices.output_len is not None
    if has_lengths and name not in ("random", "prefix"):
        raise ConfigError(
            f"--input-len and --output-len belong to random and prefix; {name} has lengths of its own",
            param="input_len",
        )
    if (choices.prefix_len is not None or choices.num_prefixes > 1) and name != "prefix":
        raise ConfigError("--prefix-len and --num-prefixes belong to --dataset prefix", param="dataset")
    if not choices.speed > 0:
        raise ConfigError(f"speed is {choices.speed}; it must be more than 0", param="speed")
    if choices.speed != 1 and not choices.uses_trace:
        raise ConfigError(
            "--speed belongs to --dataset trace without --rate and --concurrency", param="speed"
        )


def _maker(choices: _Choices, kind: Literal["ids", "text"]) -> Any:
    from pagewire.bench.serve.prompts import PromptMaker

    if choices.tokenizer is None:
        return PromptMaker(kind, choices.vocab_size)
    from pagewire.bench.serve.tokenizer_file import find_tokenizer

    return PromptMaker(kind, choices.vocab_size, find_tokenizer(choices.tokenizer))


def _loads(choices: _Choices, size: int | None) -> list[Load]:
    """A load for each of the rates or concurrencies."""
    rates = _numbers(choices.rate, "rate") or [math.inf]
    limits: list[float | None] = [*_numbers(choices.concurrency, "concurrency")] or [None]
    if len(rates) > 1 and len(limits) > 1:
        raise ConfigError("--rate and --concurrency are both lists; one of them may be", param="rate")
    if choices.burstiness != 1 and all(map(math.isinf, rates)):
        raise ConfigError("--burstiness belongs to a --rate that is not inf", param="burstiness")
    count = choices.num_requests
    if count is None and choices.duration is None:
        count = size or DEFAULT_NUM_REQUESTS
    return [
        Load(
            rate=rate,
            concurrency=None if limit is None else int(limit),
            burstiness=choices.burstiness,
            num_requests=count,
            duration=choices.duration,
            seed=choices.seed,
        )
        for rate in rates
        for limit in limits
    ]


def _numbers(text: str | None, option: str) -> list[float]:
    """Of a list such as "1,2,4"; "inf" is a rate."""
    if text is None:
        return []
    try:
        numbers = [float(part) if option == "rate" else int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(number > 0 for number in numbers):
        kind = "numbers above 0, or inf" if option == "rate" else "whole numbers above 0"
        raise ConfigError(f"{option} is {text!r}; it must be {kind}, separated by commas", param=option)
    return numbers


def _headers(texts: list[str], api_key: str | None) -> tuple[tuple[str, str], ...]:
    headers = [("authorization", f"Bearer {api_key}")] if api_key else []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isprintable():
            raise ConfigError(f"header is {text!r}; it must be 'NAME: VALUE'", param="header")
        headers.append((name.strip(), value.strip()))
    return tuple(headers)


def _extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json_format.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"extra_body is {text!r}; it must be a JSON object", param="extra_body")
    return fields


def _without_secrets(command: str, target: Target) -> str:
    """A command line as it may be kept: what headers say, keys among it, is left out."""
    for _, value in target.headers:
        for secret in (value, value.removeprefix("Bearer ")):
            command = command.replace(secret, "...") if secret else command
    return command


def _shown(target: Target) -> dict[str, Any]:
    """The target for a record; keys and the like are nobody's business."""
    return {
        "url": target.url,
        "model": target.model,
        "api": "grpc" if target.is_grpc else "chat" if target.chat else "completions",
        "headers": [name for name, _ in target.headers],
        "temperature": target.temperature,
        "ignore_eos": target.ignore_eos,
        "extra_body": target.extra_body,
    }
