"""pagewire bench strategies: one load on a service for each of the batching strategies."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import WorkerConfig
from pagewire.base.errors import ConfigError
from pagewire.base.options import examples, with_options
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.target import Target
from pagewire.bench.workloads import Lengths
from pagewire.cli.arguments import OWN_SERVER, Model
from pagewire.cli.service import ServiceConfig
from pagewire.hub.names.aliases import DEFAULT_MODEL
from scheduler.settings import BATCHING_STRATEGIES

ALL_STRATEGIES = ",".join(BATCHING_STRATEGIES)
DEFAULT_CONCURRENCY = 16
WAITS_FOR_OTHERS = ("static", "dynamic")
MAX_COLUMNS = 250

Strategies = Annotated[str, typer.Option(metavar="NAME[,NAME]", help="Those to measure, in this order.")]
QueueDelay = Annotated[
    int | None,
    typer.Option(min=0, help="Of static and dynamic; default theirs. See `pagewire serve --help`."),
]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Requests in a full batch, and computed at once.")]
Rate = Annotated[float | None, typer.Option(help="Requests a second, at random times (a Poisson process).")]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"The most requests open at once.  [default: {DEFAULT_CONCURRENCY} without --rate]"
    ),
]
NumRequests = Annotated[int, typer.Option(min=1, help="Requests for each strategy.")]
InputLen = Annotated[
    str, typer.Option(metavar="N[:M]", help="Prompt tokens, all N or uniformly from N to M.")
]
OutputLen = Annotated[str, typer.Option(metavar="N[:M]", help="Output tokens, likewise.")]
VocabSize = Annotated[int, typer.Option(min=1, help="Random token ids are smaller than this.")]
LoadSeed = Annotated[int, typer.Option(help="Of lengths and times; contents are always new.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="Write a summary here, after each strategy what is known."),
]
Picture = Annotated[
    Path | None, typer.Option(dir_okay=False, metavar="FILE.svg", help="Draw throughput and latencies here.")
]


EXAMPLES = examples("pagewire bench strategies smollm2-135m")


def register(bench: typer.Typer) -> None:
    """Adds the command to `pagewire bench`."""
    options = with_options(WorkerConfig, without=("socket", "rank"))
    bench.command("strategies", epilog=EXAMPLES)(options(strategies))


def strategies(
    model: Model = DEFAULT_MODEL,
    strategies: Strategies = ALL_STRATEGIES,
    max_queue_delay_microseconds: QueueDelay = None,
    max_num_seqs: MaxNumSeqs = 8,
    rate: Rate = None,
    concurrency: Concurrency = None,
    num_requests: NumRequests = 64,
    input_len: InputLen = "16:64",
    output_len: OutputLen = "8:64",
    vocab_size: VocabSize = 32_000,
    load_seed: LoadSeed = 0,
    json: Json = None,
    picture: Picture = None,
    **values: Any,
) -> None:
    """Throughput and latency of the batching strategies: a service for each, all under the same load."""
    from pagewire.bench.serve.datasets import RandomDataset
    from pagewire.bench.serve.metrics import Objectives
    from pagewire.bench.serve.prompts import PromptMaker
    from pagewire.bench.serve.sweep import Sweep
    from pagewire.cli.background import background_service

    chosen = _chosen(strategies)
    if rate is None and concurrency is None:
        concurrency = DEFAULT_CONCURRENCY
    load = Load(
        rate=math.inf if rate is None else rate,
        concurrency=concurrency,
        num_requests=num_requests,
        seed=load_seed,
    )
    dataset = RandomDataset(
        maker=PromptMaker("ids", vocab_size),
        seed=load_seed,
        input=Lengths.parse(input_len, "input-len"),
        output=Lengths.parse(output_len, "output-len"),
        contents=secrets.token_hex(8),
    )
    # As many as a batch takes go ahead, so that no strategy has to wait for more.
    sweep = Sweep(dataset=dataset, loads=[load], warmup=max_num_seqs, objectives=Objectives({}))
    options = {
        **{name: value for name, value in values.items() if value is not None},
        **OWN_SERVER,
        "max_num_seqs": max_num_seqs,
        "max_num_waiting": max(num_requests, max_num_seqs),
    }

    @contextmanager
    def start(strategy: str) -> Iterator[Target]:
        own: dict[str, Any] = {"batching_strategy": strategy}
        if strategy in WAITS_FOR_OTHERS:
            own["max_queue_delay_microseconds"] = max_queue_delay_microseconds
        config = ServiceConfig.resolve(model, {**options, **own})
        print(f"{strategy} ...", file=sys.stderr, flush=True)
        with background_service(config) as service:
            yield Target(url=f"http://{service.http_address}", model=service.model)

    about = {
        "model": model,
        "load": str(load),
        "dataset": str(dataset),
        "max_num_seqs": max_num_seqs,
        "max_queue_delay_microseconds": max_queue_delay_microseconds,
    }
    _run(chosen, start, sweep, about, json, picture)


def _run(
    chosen: list[str], start: Any, sweep: Any, about: dict[str, Any], json: Path | None, picture: Path | None
) -> None:
    """Measures, and writes what is known after each strategy."""
    from rich.console import Console

    from pagewire.bench.record import describe_run, write_record
    from pagewire.bench.strategies import measure_strategies, strategies_table
    from pagewire.bench.strategies import picture as draw

    title = f"{about['model']}, {about['dataset']}, {about['load']}, batches of {about['max_num_seqs']}"
    print(title, file=sys.stderr, flush=True)
    record = {**describe_run("strategies"), **about}
    results: dict[str, dict[str, Any]] = {}
    for strategy, result in measure_strategies(chosen, start, sweep):
        results[strategy] = result
        if json is not None:
            write_record(json, {**record, "results": results})
        if picture is not None:
            picture.write_text(draw(results, title), encoding="utf-8")
    Console(highlight=False, width=MAX_COLUMNS).print(strategies_table(results))
    if not all(result["requests"]["complete"] for result in results.values()):
        raise typer.Exit(1)


def _chosen(names: str) -> list[str]:
    """The strategies in a list such as "none,inflight".

    Raises:
        ConfigError: there is no such strategy.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen or not set(chosen) <= set(BATCHING_STRATEGIES):
        raise ConfigError(
            f"strategies is {names!r}; it must be one or more of {', '.join(BATCHING_STRATEGIES)}, separated "
            "by commas",
            param="strategies",
        )
    return chosen
