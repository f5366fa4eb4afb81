"""Which architectures are implemented: how each one's config.json is read, and which class computes it.

Importing this module imports no model and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.config import ModelConfig
from engine.models.readers.eos import tokenizer_eos_token_id, turn_end_token_ids
from engine.models.readers.fields import ConfigFields
from engine.models.readers.llama import read_llama
from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import read_json_object

if TYPE_CHECKING:
    from engine.models.base import CausalLM

# Makes a configuration of: the fields of config.json, the architecture's name, and every file that may name
# tokens which end a completion (name -> its values). Raises ConfigError, as `load_model_config` does.
ReadConfig = Callable[[ConfigFields, str, Mapping[str, Mapping[str, Any]]], ModelConfig]


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures that are configured and computed alike.

    Attributes:
        read_config: makes a ModelConfig of a config.json.
        model: the class that computes it, as "module:class".
    """

    read_config: ReadConfig
    model: str


_LLAMA = Family(read_llama, "engine.models.llama:LlamaForCausalLM")
# By the name in config.json's `architectures`.
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class that implements a supported architecture."""
    module, name = FAMILIES[architecture].model.split(":")
    cls: type[CausalLM] = getattr(import_module(module), name)
    return cls


def load_model_config(directory: Path) -> ModelConfig:
    """Reads config.json and, where they are, generation_config.json and the tokenizer's end of text.

    Raises:
        ConfigError: a file is missing or malformed, the architecture is unknown, or the model uses a
            feature that is not implemented. Nothing the model needs is ignored.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    config = parse_model_config(values, generation, source=str(path), generation_source=str(generation_path))
    by_tokenizer = (
        tokenizer_eos_token_id(directory),
        *turn_end_token_ids(directory, str(values.get("model_type", ""))),
    )
    # What is beyond the model's vocabulary it never computes.
    further = [each for each in by_tokenizer if each is not None and 0 <= each < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *further))))


def parse_model_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    source: str,
    generation_source: str = "generation_config.json",
) -> ModelConfig:
    """The configuration in parsed JSON; the sources name it in errors. Raises as load_model_config."""
    architecture = _architecture(values, source)
    eos_sources = {generation_source: generation, source: values}
    return FAMILIES[architecture].read_config(ConfigFields(values, source), architecture, eos_sources)


def _architecture(values: Mapping[str, Any], source: str) -> str:
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"{source}: architectures is {architectures!r}; it must be a list of one name")
    architecture = str(architectures[0])
    if architecture not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{source}: architecture {architecture!r} is not supported; supported: {supported}")
    return architecture
