"""A model's quantization: the scheme of each of its matrices, by the names that its checkpoint gives them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.quant.excluded import ExcludedModules
from engine.quant.schemes import Activations, AtLoad, Fp8, Scheme


@dataclass(frozen=True, slots=True)
class SchemeRule:
    """Some modules and their scheme.

    Attributes:
        scheme: None leaves them in full precision.
        names: whole names of modules.
        patterns: regular expressions that a name begins with.
        everything: whether the rule is for all modules that no other rule names.
    """

    scheme: Scheme | None
    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's linear layers are quantized.

    Attributes:
        method: what the format is called, such as "gptq".
        summary: the same for people, such as "gptq, 4 bits in groups of 128".
        rules: whole names take precedence over patterns, and those over "everything"; of several that match
            alike the first holds.
        excluded: modules in full precision, whatever the rules say.
    """

    method: str
    summary: str
    rules: tuple[SchemeRule, ...]
    excluded: ExcludedModules = field(default_factory=lambda: ExcludedModules([], ""))

    def scheme_of(self, modules: Sequence[str]) -> Scheme | None:
        """The scheme of a matrix; None if it is in full precision.

        Args:
            modules: what checkpoints may call it: its own name, and that of a module that holds it and
                others.
        """
        if any(module in self.excluded for module in modules):
            return None
        named = (rule for rule in self.rules if not rule.names.isdisjoint(modules))
        matching = (
            rule
            for rule in self.rules
            if any(pattern.match(module) for pattern in rule.patterns for module in modules)
        )
        everything = (rule for rule in self.rules if rule.everything)
        for found in (named, matching, everything):
            rule = next(found, None)
            if rule is not None:
                return rule.scheme
        return None

    @property
    def has_invariant_products(self) -> bool:
        """Whether a GPU can have each token's products bitwise the same in any batch."""
        return not any(
            isinstance(each, Fp8) and each.activations is Activations.NONE for each in self.schemes
        )

    @property
    def is_fp8(self) -> bool:
        """Whether all that is quantized is e4m3."""
        return all(isinstance(each, Fp8) or each == AtLoad("fp8") for each in self.schemes)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that a matrix may have, each once."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))
