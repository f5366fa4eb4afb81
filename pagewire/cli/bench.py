"""pagewire bench: how fast an engine is, by workloads with names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import WorkerConfig
from pagewire.base.command_line import arguments
from pagewire.base.errors import ConfigError
from pagewire.base.options import build, examples, with_options
from pagewire.bench.shapes import SHAPES, shape_directory
from pagewire.bench.targets import peer, settings, startup_targets, throughput_targets
from pagewire.bench.workloads import NAMED, Lengths, Workload, named
from pagewire.cli import bench_serve, bench_strategies
from pagewire.cli.completion import complete_model
from pagewire.hub.names.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.table import Table


def _complete_model(incomplete: str) -> Iterator[tuple[str, str]]:
    shapes = ((name, "random weights") for name in SHAPES if name.startswith(incomplete))
    return chain(shapes, complete_model(incomplete))


BenchModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in Hugging Face layout, a .gguf file, a model on a hub, an alias, or one of the "
        f"shapes {', '.join(SHAPES)}, which have random weights and the peer's engine options.",
        autocompletion=_complete_model,
    ),
]
WorkloadNames = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="NAME[,NAME]",
        help="; ".join(f"{name}: {workload}" for name, workload in NAMED.items()) + ".",
    ),
]
NumRequests = Annotated[int | None, typer.Option(min=1, help="Requests of a workload of your own.")]
PromptLen = Annotated[
    str | None,
    typer.Option(
        metavar="N[:M]", help="Its prompts' tokens, all N or uniformly from N to M.  [default: 512]"
    ),
]
OutputLen = Annotated[
    str | None, typer.Option(metavar="N[:M]", help="Its outputs' tokens, likewise.  [default: 128]")
]
SharedPrefix = Annotated[
    int | None, typer.Option(min=0, help="Tokens its prompts begin with in common, before their own.")
]
WorkloadSeed = Annotated[int, typer.Option(help="Of its lengths and tokens.")]
Repeat = Annotated[int, typer.Option(min=1, help="Runs of each workload; the median counts.")]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(help="Share the KV of common prefixes. By default only W5 and --shared-prefix do."),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", dir_okay=False, help="Write everything here, after each workload what is known so far."
    ),
]

DEFAULT_NUM_REQUESTS, DEFAULT_PROMPT_LEN, DEFAULT_OUTPUT_LEN = 64, "512", "128"
MAX_COLUMNS = 250
with_worker_options = with_options(WorkerConfig, without=("socket", "rank"))

THROUGHPUT_EXAMPLES = (
    "pagewire bench throughput smollm2-135m --num-requests 16",
    "pagewire bench throughput llama8b --workload W1,W2 --json results.json",
)
LATENCY_EXAMPLES = (
    "pagewire bench latency smollm2-135m --prompt-len 128 --output-len 32",
    "pagewire bench latency smollm2-135m --batch-size 1 --repeat 3",
)
STARTUP_EXAMPLES = ("pagewire bench startup smollm2-135m --repeat 1",)


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    bench = typer.Typer(
        help="Measure an engine: throughput, latency, start-up; or any server under load.",
        no_args_is_help=True,
        rich_markup_mode=None,
        epilog=examples(*THROUGHPUT_EXAMPLES[:1], *LATENCY_EXAMPLES[:1], *bench_serve.EXAMPLES[:1]),
    )
    bench.command(epilog=examples(*THROUGHPUT_EXAMPLES))(with_worker_options(throughput))
    bench.command(epilog=examples(*LATENCY_EXAMPLES))(with_worker_options(latency))
    bench.command(epilog=examples(*STARTUP_EXAMPLES))(with_worker_options(startup))
    bench.command(epilog=examples(*bench_serve.EXAMPLES))(bench_serve.serve)
    bench_strategies.register(bench)
    app.add_typer(bench, name="bench")


def throughput(
    model: BenchModel = DEFAULT_MODEL,
    workload: WorkloadNames = None,
    num_requests: NumRequests = None,
    prompt_len: PromptLen = None,
    output_len: OutputLen = None,
    shared_prefix: SharedPrefix = None,
    workload_seed: WorkloadSeed = 0,
    enable_prefix_caching: PrefixCaching = None,
    repeat: Repeat = 3,
    json: Json = None,
    **values: Any,
) -> None:
    """Tokens a second when all requests are there at once. Without --workload or lengths of your own: W1."""
    from pagewire.bench.tables import throughput_line, throughput_table
    from pagewire.bench.throughput import measure_throughput

    workloads = _workloads(workload, "W1", num_requests, prompt_len, output_len, shared_prefix, workload_seed)
    workloads = _with_prefix_caching(workloads, enable_prefix_caching)
    targets = {each.name: throughput_targets(model, each.name) for each in workloads}
    _run(
        "throughput",
        model,
        values,
        workloads,
        json,
        measure=lambda engine, each: measure_throughput(engine, each, repeat),
        line=throughput_line,
        table=lambda results: throughput_table(results, targets),
        targets=targets,
    )


def latency(
    model: BenchModel = DEFAULT_MODEL,
    workload: WorkloadNames = None,
    num_requests: NumRequests = None,
    prompt_len: PromptLen = None,
    output_len: OutputLen = None,
    shared_prefix: SharedPrefix = None,
    workload_seed: WorkloadSeed = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Requests handed over at once.  [default: the whole workload]")
    ] = None,
    enable_prefix_caching: PrefixCaching = None,
    repeat: Repeat = 10,
    json: Json = None,
    **values: Any,
) -> None:
    """Milliseconds each request waits. Without --workload or lengths of your own: W3."""
    from pagewire.bench.latency import measure_latency
    from pagewire.bench.tables import latency_line, latency_table

    workloads = _workloads(workload, "W3", num_requests, prompt_len, output_len, shared_prefix, workload_seed)
    _run(
        "latency",
        model,
        values,
        _with_prefix_caching(workloads, enable_prefix_caching),
        json,
        measure=lambda engine, each: measure_latency(engine, each, batch_size=batch_size, repeat=repeat),
        line=latency_line,
        table=latency_table,
        targets={},
    )


def startup(
    model: BenchModel = DEFAULT_MODEL,
    repeat: Repeat = 3,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a start may take.")] = 300.0,
    json: Json = None,
    **values: Any,
) -> None:
    """Seconds from the start of `pagewire serve` until it serves, with empty kernel caches and full ones."""
    from pagewire.bench.record import describe_run, write_record
    from pagewire.bench.startup import measure_startup
    from pagewire.bench.tables import startup_table
    from pagewire.hub import resolve_checkpoint

    config = _worker_config(model, values)
    directory, _ = resolve_checkpoint(config.model, config.load_format, progress=True)
    options = arguments(config)[3:]  # without MODEL and --socket PATH
    targets = startup_targets(model)
    results = measure_startup([str(directory), *options], repeat=repeat, timeout=timeout)
    if json is not None:
        about = {"model": model, "options": options, **_peer(targets)}
        write_record(json, {**describe_run("startup"), **about, "targets": targets, "results": results})
    _show(startup_table(results, targets))


def _run(
    benchmark: str,
    model: str,
    values: dict[str, Any],
    workloads: list[Workload],
    json: Path | None,
    *,
    measure: Callable[[Any, Workload], dict[str, Any]],
    line: Callable[[str, dict[str, Any]], str],
    table: Callable[[dict[str, Any]], Table],
    targets: dict[str, dict[str, float]],
) -> None:
    """Loads the engine once, measures every workload, and reports each as soon as it is done."""
    from pagewire.bench.engine import BenchEngine
    from pagewire.bench.record import describe_run, write_record

    config = _worker_config(model, values)
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("model", "socket")
    }
    record = describe_run(benchmark) | {"model": model, "options": options, **_peer(targets)}
    results: dict[str, dict[str, Any]] = {}
    print(f"loading {model} ...", file=sys.stderr, flush=True)
    with BenchEngine(config.model, workloads, options) as engine:
        engine.warm_up()
        record["engine"] = engine.describe()
        for each in workloads:
            results[each.name] = measure(engine, each)
            print(line(each.name, results[each.name]), file=sys.stderr, flush=True)
            if json is not None:
                write_record(json, {**record, "targets": targets, "results": results})
    _show(table(results))


def _worker_config(model: str, values: dict[str, Any]) -> WorkerConfig:
    """The worker's configuration; a bundled shape's defaults are the options the peer was measured with."""
    config = build(WorkerConfig, {**values, "model": model, "socket": Path("worker.sock")})
    directory = shape_directory(model)
    if directory is None:
        return config
    if config.load_format not in ("auto", "dummy"):
        raise ConfigError(f"{model} is a shape without weights; its load_format can only be dummy")
    plain = {field.name: field.default for field in dataclasses.fields(WorkerConfig)}
    unset = {name: value for name, value in settings().items() if getattr(config, name) == plain[name]}
    return dataclasses.replace(config, model=str(directory), load_format="dummy", **unset)


def _workloads(
    names: str | None,
    default: str,
    num_requests: int | None,
    prompt_len: str | None,
    output_len: str | None,
    shared_prefix: int | None,
    seed: int,
) -> list[Workload]:
    """The named workloads, or the one described."""
    described = (num_requests, prompt_len, output_len, shared_prefix) != (None,) * 4
    if described and names is not None:
        raise ConfigError(
            "--workload names workloads with lengths of their own; give it, or lengths, not both"
        )
    if not described:
        return named(names or default)
    return [
        Workload(
            name="custom",
            num_requests=num_requests or DEFAULT_NUM_REQUESTS,
            prompt=Lengths.parse(prompt_len or DEFAULT_PROMPT_LEN, "prompt-len"),
            output=Lengths.parse(output_len or DEFAULT_OUTPUT_LEN, "output-len"),
            shared_prefix=shared_prefix or 0,
            prefix_caching=bool(shared_prefix),
            seed=seed,
        )
    ]


def _with_prefix_caching(workloads: list[Workload], wanted: bool | None) -> list[Workload]:
    if wanted is None:
        return workloads
    return [dataclasses.replace(workload, prefix_caching=wanted) for workload in workloads]


def _peer(targets: dict[str, Any]) -> dict[str, Any]:
    """Whose figures the targets are, if there are any."""
    return {"peer": peer()} if any(targets.values()) else {}


def _show(table: Table) -> None:
    """Prints a table, never cut to the width of a terminal or of what stands for one in a file."""
    from rich.console import Console

    Console(highlight=False, width=MAX_COLUMNS).print(table)
