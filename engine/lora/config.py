"""adapter_config.json as PEFT writes it, and as ms-swift does.

Reference: peft/tuners/lora/config.py. What an adapter's tensors say by themselves (their modules, their
ranks) is taken from them; the configuration says how they are scaled, and what else was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.adapters import CONFIG_FILE
from pagewire.hub.model_files import read_json_object

BIASES = ("none", "all", "lora_only")
# Beyond these a rank is a mistake, or made to exhaust memory.
MAX_RANK = 4096
_MAX_PATTERNS = 4096
_MAX_PATTERN = 256
# Initialisations that change the base model's weights too, so that the adapter does not fit the base alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# Settings of other methods, which change what the adapter computes.
_REFUSED = (
    *("layer_replication", "alora_invocation_tokens", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "arrow_config", "monteclora_config", "kasa_config", "velora_config", "lora_ga_config"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says of how an adapter's tensors are used.

    Attributes:
        source: the file, for errors.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: by the end of a module's name, or a regular expression for it.
        use_rslora: whether alpha is divided by the square root of the rank (arXiv:2312.03732).
        use_dora: whether modules have a trained magnitude (arXiv:2402.09353).
        target_modules: as given: "all-linear", a regular expression, or names.
        modules_to_save: modules that were trained whole.
        bias: which of the base model's biases were trained: "none", "all" or "lora_only".
        fan_in_fan_out: whether the base stores its matrices transposed. LoRA's own are stored alike.
        base_model: the name of the model it was trained for; "" where it does not say.
    """

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    fan_in_fan_out: bool = False
    base_model: str = ""

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Raises:
        ConfigError: the file is missing or malformed, or asks for what is not implemented.
        """
        path = directory / CONFIG_FILE
        return cls.parse(read_json_object(path), str(path))

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> AdapterConfig:
        """The configuration in parsed JSON; `source` names it in errors. Raises as `read`."""
        kind = values.get("peft_type") or values.get("swift_type")
        if kind != "LORA":
            raise ConfigError(f"{source}: peft_type is {kind!r}; supported is 'LORA'")
        _refuse_unsupported(values, source)
        rank = _number(values, "r", source)
        if rank != int(rank) or not 1 <= rank <= MAX_RANK:
            raise ConfigError(f"{source}: r is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
        bias = values.get("bias", "none") or "none"
        if bias not in BIASES:
            raise ConfigError(f"{source}: bias is {bias!r}; it must be one of {', '.join(BIASES)}")
        return cls(
            source=source,
            rank=int(rank),
            alpha=_number(values, "lora_alpha", source, default=rank),
            rank_pattern={
                key: int(value) for key, value in _patterns(values, "rank_pattern", source).items()
            },
            alpha_pattern=_patterns(values, "alpha_pattern", source),
            use_rslora=_flag(values, "use_rslora", source),
            use_dora=_flag(values, "use_dora", source),
            target_modules=_names(values, "target_modules", source, one_is_pattern=True),
            modules_to_save=tuple(_names(values, "modules_to_save", source)),
            bias=bias,
            fan_in_fan_out=_flag(values, "fan_in_fan_out", source),
            base_model=str(values.get("base_model_name_or_path") or ""),
        )

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by.

        Args:
            module: its full name in the base model, as PEFT has it.
            rank: of its tensors.
        """
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank_of(self, module: str) -> int:
        """The rank that a module's tensors must have."""
        return int(_matching(self.rank_pattern, module, self.rank))


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As peft.utils.other.get_pattern_key: the first pattern that the module's name, or its end, fits."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{source}: init_lora_weights is {init!r}, which changes the base model's weights too; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which turns it into one for the "
            "unchanged base"
        )
    for name in _REFUSED:
        if values.get(name):
            raise ConfigError(f"{source}: {name} is set, which is not supported")


def _number(values: Mapping[str, Any], name: str, source: str, *, default: float | None = None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{source}: {name} is {value!r}; it must be a number")
    return float(value)


def _flag(values: Mapping[str, Any], name: str, source: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{source}: {name} is {value!r}; it must be true or false")
    return bool(value)


def _names(
    values: Mapping[str, Any], name: str, source: str, *, one_is_pattern: bool = False
) -> str | tuple[str, ...]:
    value = values.get(name)
    if value is None:
        return ()
    if one_is_pattern and isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{source}: {name} is {value!r}; it must be a list of names")
    return tuple(value)


def _patterns(values: Mapping[str, Any], name: str, source: str) -> dict[str, float]:
    """Patterns and their numbers, checked so that matching them ends soon."""
    given = values.get(name) or {}
    if not isinstance(given, dict) or len(given) > _MAX_PATTERNS:
        raise ConfigError(f"{source}: {name} must be an object of at most {_MAX_PATTERNS} patterns")
    for pattern, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**20:
            raise ConfigError(
                f"{source}: {name} gives {value!r} to {pattern!r}; it must be a positive number"
            )
        _require_quick(pattern, f"{source}: {name}")
    return {pattern: float(value) for pattern, value in given.items()}


def _require_quick(pattern: str, where: str) -> None:
    """Refuses expressions whose matching can take long: many repetitions, or repetitions of groups."""
    is_long = len(pattern) > _MAX_PATTERN
    if (
        is_long
        or re.search(r"\)[*+{]|\\[1-9]|\(\?", pattern)
        or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 2
    ):
        raise ConfigError(
            f"{where} has the expression {pattern[:_MAX_PATTERN]!r}; at most {_MAX_PATTERN} characters and "
            "two "
            "repetitions, none of a group, are read"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise ConfigError(f"{where} has {pattern!r}, which is no regular expression: {error}") from error
