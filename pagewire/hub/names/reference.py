"""What users type for a model on a hub: [HUB:]owner/name[@REVISION][:FILE]."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from pagewire.base.errors import ConfigError
from pagewire.hub.names.model_types import MODEL_TYPES

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
HUBS = (HUGGINGFACE, MODELSCOPE)
HUB_TITLES = {HUGGINGFACE: "the Hugging Face Hub", MODELSCOPE: "ModelScope"}

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REFERENCE = re.compile(
    rf"(?:(?P<hub>{'|'.join(HUBS)}):)?"
    r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
    r"(?::(?P<file>[^:@]+))?"
)


def is_repository_id(model: str) -> bool:
    """Whether it has the form owner/name."""
    return _ID.fullmatch(model) is not None and ".." not in model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """A model on a hub.

    Attributes:
        name: owner/name, or the model_type of an ms-swift guide.
        hub: one of HUBS.
        revision: a branch, tag or commit; None for the hub's default branch.
        file: which GGUF file is meant, by its path in the repository or by its quantization, such as
            "Q4_K_M"; None where weights in Hugging Face layout are, or the only GGUF file.
    """

    name: str
    hub: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference | None:
        """None if it is no reference. Where it names no hub, `default_hub` is meant.

        Raises:
            ConfigError: as `default_hub`.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None or ".." in text:
            return None
        name = match["name"]
        if not is_repository_id(name) and name not in MODEL_TYPES:
            return None
        return cls(
            name=name, hub=match["hub"] or default_hub(), revision=match["revision"], file=match["file"]
        )

    def __str__(self) -> str:
        """What to type to get it whatever the environment's hub is."""
        revision = f"@{self.revision}" if self.revision else ""
        file = f":{self.file}" if self.file else ""
        return f"{self.hub}:{self.name}{revision}{file}"

    @property
    def repository(self) -> str:
        """owner/name on the hub."""
        model_type = MODEL_TYPES.get(self.name)
        if model_type is None:
            return self.name
        return model_type.huggingface if self.hub == HUGGINGFACE else model_type.modelscope


def default_hub() -> str:
    """`$PAGEWIRE_HUB`, or else the Hugging Face Hub.

    Raises:
        ConfigError: it names another.
    """
    return _known_hub(os.environ.get("PAGEWIRE_HUB") or HUGGINGFACE, "PAGEWIRE_HUB")


def located(
    model: str, *, hub: str | None = None, revision: str | None = None, file: str | None = None
) -> str:
    """The model with what options say of where it is, as one word for `resolve_model`.

    Raises:
        ConfigError: an option is wrong, or the model is not on a hub.
    """
    if (hub, revision, file) == (None, None, None):
        return model
    reference = ModelReference.parse(model)
    if reference is None:
        raise ConfigError(f"hub, revision and file are for models on a hub (owner/name); '{model}' is none")
    if hub is not None:
        reference = replace(reference, hub=_known_hub(hub, "hub"))
    whole = str(replace(reference, revision=revision or reference.revision, file=file or reference.file))
    if ModelReference.parse(whole) is None:
        raise ConfigError(f"revision {revision!r} or file {file!r} has characters that none has on a hub")
    return whole


def _known_hub(hub: str, param: str) -> str:
    if hub not in HUBS:
        raise ConfigError(f"{param} is {hub!r}; it must be one of {', '.join(HUBS)}", param=param)
    return hub
