"""pagewire warmup: compiles kernels ahead of the first start, as the build of a container image would."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import WorkerConfig
from engine.warmup.target import choose_target
from pagewire.base.options import build, examples, with_options
from pagewire.cli.arguments import Model

EXAMPLES = examples(
    "pagewire warmup Qwen/Qwen3-8B                   # for the GPU that is here",
    "pagewire warmup Qwen/Qwen3-8B --target sm_90    # where there is none, as in the build of an image",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    options = with_options(WorkerConfig, without=("socket", "rank"))
    app.command("warmup", epilog=EXAMPLES)(options(warmup))


def warmup(
    model: Model,
    target: Annotated[
        str | None,
        typer.Option(metavar="sm_NN", help="Compile for this architecture; default the GPU that is here."),
    ] = None,
    **values: Any,
) -> None:
    """Compile the GPU kernels that serving a model needs. Options are those that it will be served with."""
    config = build(WorkerConfig, {**values, "model": model, "socket": Path()})
    gpu, launchable = choose_target(config, target)

    from engine.warmup.warm_up import warm_up

    done = warm_up(config, gpu, launchable=launchable)
    if not done.compiled:
        print(f"all kernels for {done.target} are in {done.directory} already")
        return
    variants: dict[str, list[float]] = defaultdict(list)
    for kernel in done.compiled:
        variants[kernel.name].append(kernel.seconds)
    for name, seconds in sorted(variants.items()):
        print(f"{sum(seconds):7.1f} s  {len(seconds):3} x {name}")
    total = sum(kernel.seconds for kernel in done.compiled)
    print(
        f"{len(done.compiled)} kernels for {done.target} in {done.seconds:.1f} s ({total:.1f} s of one core)"
    )
    print(f"kept in {done.directory}")
