"""The sampling parameters that a model's authors recommend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import read_json_object

_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_WHOLE_NUMBERS = ("top_k", "max_new_tokens")


def load_generation_defaults(model_dir: Path) -> dict[str, Any]:
    """The sampling fields of generation_config.json, by SamplingParams field; empty without the file.

    A field that is missing or null is left to the server's own default. `do_sample` is not read, as in
    vLLM: many published files leave it false beside a temperature that is meant to be used, and a
    request that wants greedy decoding says so with temperature 0.

    Raises:
        ConfigError: the file is not a JSON object or a field is not a number. Whether it is in its
            range is SamplingParams' to check.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return {}
    config = read_json_object(path)
    defaults = {}
    for name, field in _SAMPLING_FIELDS.items():
        value = config.get(name)
        if value is None:
            continue
        wanted = int if name in _WHOLE_NUMBERS else (int, float)
        # JSON's integers have no limit, which for those beyond a double's range is an error much later.
        if isinstance(value, bool) or not isinstance(value, wanted) or abs(value) > sys.float_info.max:
            kind = "whole number" if name in _WHOLE_NUMBERS else "number"
            raise ConfigError(f"{path}: {name} is {value!r}; it must be a {kind}")
        defaults[field] = value
    return defaults
