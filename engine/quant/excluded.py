"""Which modules of a quantized checkpoint were left in full precision."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pagewire.base.errors import ConfigError


class ExcludedModules:
    """The modules that a quantization's configuration lists under `ignore` (compressed-tensors),
    `modules_to_not_convert` (AWQ, FP8, bitsandbytes) or `ignored_layers` (FP8).

    Names are those of checkpoints, of unfused modules: "model.layers.3.self_attn.q_proj". See
    CheckpointNames.module.
    """

    def __init__(self, entries: Sequence[str], source: str, *, substrings: bool = False) -> None:
        """
        Args:
            entries: "re:" and a regular expression for the beginning of a name, as compressed-tensors has it;
                or one or several whole parts of a name between its dots: "lm_head" and "mlp.gate" exclude
                "model.layers.0.mlp.gate" but not "model.layers.0.mlp.gate_proj".
            source: the file that lists them, for errors.
            substrings: whether entries are any piece of a name instead, as in AWQ.

        Raises:
            ConfigError: a regular expression is malformed.
        """
        self._pieces = tuple(entries) if substrings else ()
        plain = () if substrings else tuple(entry for entry in entries if not entry.startswith("re:"))
        self._parts = tuple(f".{entry}." for entry in plain)
        patterns = () if substrings else tuple(entry for entry in entries if entry.startswith("re:"))
        self._patterns = tuple(_compile(entry, source) for entry in patterns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExcludedModules):
            return NotImplemented
        return (self._pieces, self._parts, self._patterns) == (other._pieces, other._parts, other._patterns)

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, module: str) -> bool:
        return (
            any(piece in module for piece in self._pieces)
            or any(part in f".{module}." for part in self._parts)
            or any(pattern.match(module) for pattern in self._patterns)
        )


def _compile(entry: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(
            f"{source}: the module pattern {entry!r} is not a regular expression: {error}"
        ) from error
