"""How a model's hidden states become vectors: what its files say (the layout of sentence-transformers)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontend.config import POOLINGS
from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.hub.model_files import read_json
from pagewire.inference.v1 import inference_pb2

logger = logging.getLogger(__name__)

_VALUES = {
    "last": inference_pb2.POOLING_LAST,
    "mean": inference_pb2.POOLING_MEAN,
    "cls": inference_pb2.POOLING_CLS,
}

_MODES = {
    "lasttoken": "last",
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "cls",  # nosec B105 # no password
    "cls": "cls",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFacts:
    """What a model is to be embedded with.

    Attributes:
        pooling: one of `POOLINGS`, or None for a model that is not made for it.
        normalize: whether vectors are scaled to length 1 unless a request says otherwise.
        max_tokens: the longest input that the model was made for, or None for what its context holds.
        obstacle: why the model's own way cannot be followed, or None.
    """

    pooling: str | None = None
    normalize: bool = True
    max_tokens: int | None = None
    obstacle: str | None = None

    @classmethod
    def load(cls, directory: Path, asked: str | None) -> EmbeddingFacts:
        """Reads modules.json and what it names. A way asked for on the command line goes before the model's.

        Raises:
            ConfigError: a file is wrong.
        """
        modules_file = directory / "modules.json"
        modules = _read(modules_file, list)
        if modules is None:
            return cls(pooling=asked)
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        own, obstacle = None, None
        for module, kind in zip(modules, kinds, strict=True):
            if kind == "Pooling":
                own, obstacle = _own_pooling(
                    _module_directory(modules_file, str(module.get("path", ""))) / "config.json"
                )
        strange = next((kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")), None)
        if strange is not None:
            obstacle = f"its modules.json has a {strange!r} module, which this server does not apply"
        if obstacle is not None:
            logger.warning("%s: no embeddings as the model's authors meant them: %s", directory, obstacle)
        prompts = _read(directory / "config_sentence_transformers.json", dict) or {}
        if prompts.get("default_prompt_name"):
            logger.warning(
                "%s: clients must write the prompt %r before their texts; the server does not",
                directory,
                prompts["default_prompt_name"],
            )
        limits_file = directory / "sentence_bert_config.json"
        limits = _read(limits_file, dict) or {}
        return cls(
            pooling=asked or own,
            normalize="Normalize" in kinds,
            max_tokens=_max_tokens(limits_file, limits.get("max_seq_length")),
            obstacle=None if asked else obstacle,
        )

    def choose(self, asked: str | None, *, is_decoder_alone: bool = False) -> inference_pb2.Pooling:
        """The way a request is pooled.

        Args:
            is_decoder_alone: whether the model can do nothing else, as e5-mistral: without a way of its own
                it is pooled by the last token, the only one that has seen all others.

        Raises:
            InvalidRequest: it asks for none and the model has none, or for one that does not exist.
        """
        name = asked or self.pooling or ("last" if is_decoder_alone else None)
        if asked is None and self.obstacle is not None:
            raise InvalidRequest(
                f"this model's own embeddings are not served: {self.obstacle}; ask for a pooling instead "
                f"({', '.join(POOLINGS)})",
                param="pooling",
            )
        if name is None:
            raise InvalidRequest(
                "this model is not made for embeddings; ask for a pooling of its hidden states "
                f"({', '.join(POOLINGS)}), or start the server with --pooling",
                param="pooling",
            )
        if name not in POOLINGS:
            raise InvalidRequest(
                f"pooling is {name!r}; it must be one of {', '.join(POOLINGS)}", param="pooling"
            )
        return _VALUES[name]


def _own_pooling(path: Path) -> tuple[str | None, str | None]:
    """The way that 1_Pooling/config.json names, or why it cannot be followed."""
    config = _read(path, dict)
    if config is None:
        raise ConfigError(f"{path}: modules.json names it, but it is not there")
    mode = config.get("pooling_mode")
    if not isinstance(mode, str | list | None):
        raise ConfigError(f"{path}: pooling_mode is {mode!r}; it must be a name or a list of names")
    modes: list[str] = [mode] if isinstance(mode, str) else list(map(str, mode or ()))
    if not modes:
        prefix = "pooling_mode_"
        modes = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on]
    known = [_MODES[each] for each in modes if each in _MODES]
    if len(modes) == 1 and known:
        return known[0], None
    return None, f"it pools by {' and '.join(modes) or 'nothing'}"


def _max_tokens(path: Path, value: Any) -> int | None:
    if value is None or (type(value) is int and value > 0):
        return value
    raise ConfigError(
        f"{path}: max_seq_length is {value!r}; it must be a whole number of at least 1, or null"
    )


def _module_directory(modules_file: Path, path: str) -> Path:
    """A module's own directory, which lies in the model's."""
    directory = modules_file.parent
    if "\0" in path or not (directory / path).resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{modules_file} names the path {path!r}; it must stay in the model's directory")
    return directory / path


def _read(path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """A JSON file's content, None if there is no such file."""
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, kind) or (
        kind is list and not all(isinstance(each, dict) for each in content)
    ):
        raise ConfigError(f"{path}: does not have the form that sentence-transformers writes")
    return content
