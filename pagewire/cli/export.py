"""pagewire export: a checkpoint quantized, with an adapter merged into it, or in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pagewire.base.options import build, examples, with_options
from pagewire.cli.arguments import Model
from pagewire.export.config import ExportConfig

EXAMPLES = examples(
    "pagewire export Qwen/Qwen3-8B qwen3-8b-awq --quant-method awq",
    "pagewire export Qwen/Qwen3-8B merged --merge-lora my-adapter",
    "pagewire export Qwen/Qwen3-8B qwen3-8b.gguf --to gguf --gguf-type q8_0",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("export", epilog=EXAMPLES)(with_options(ExportConfig)(export))


def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="What to write: a new directory, or a file that ends in .gguf."),
    ],
    **values: Any,
) -> None:
    """Write a checkpoint quantized, with an adapter merged into it, or in another layout.

    One decoder layer is in memory at a time. What was ended early, by Ctrl-C or kill -9, goes on when the
    same command is run again: layers that are written stay.
    """
    config = build(ExportConfig, {**values, "model": model, "out": out})

    if config.to == "gguf":
        from pagewire.export.gguf_file import export_gguf

        made = export_gguf(config)
    else:
        from pagewire.export.run import export_hf

        made = export_hf(config)
    print(f"wrote {made.path}: {made.summary}, {made.num_bytes / 1e6:,.0f} MB of weights")
    print(f"serve it: pagewire serve {made.path}")
