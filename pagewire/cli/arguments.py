"""Arguments that several commands share and no configuration class defines."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in Hugging Face layout, a .gguf file, a Hugging Face id or an alias.",
    ),
]
