"""What a step costs the device at least: the products that it computes, and the weights that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from engine.kernels.quantized.words import WordMatrix
from engine.layers.experts import Experts
from engine.models.base import CausalLM
from engine.quant.layouts.base import layouts_of

# What one H200 does (docs/benchmarks.md), as products of whole models reach it.
_FLOPS = 6e14
_BYTES_PER_SECOND = 4.3e12
# Of each expert: gate, up and down.
_MATRICES = 3


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of a step of so many tokens.

    Attributes:
        operations: additions and multiplications of the products with weights.
        num_bytes: of weights that are read.
    """

    operations: float
    num_bytes: float

    @property
    def seconds(self) -> float:
        """How long the device takes at least."""
        return max(self.operations / _FLOPS, self.num_bytes / _BYTES_PER_SECOND)


def step_cost(model: CausalLM, num_tokens: int) -> StepCost:
    """The cost of a step without attention. Every token uses all weights but those of experts, of which it
    uses its own few, and the step reads the experts that any of its tokens uses."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    configs = [layer.experts for layer in model.config.layers if layer.experts is not None]
    of_experts = {parameter for module in experts for parameter in module.parameters()}
    common = [parameter for parameter in model.parameters() if parameter not in of_experts]
    layouts = list(layouts_of(model))
    quantized = sum(layout.out_features * layout.in_features for layout in layouts)
    weights_of_token = float(sum(parameter.numel() for parameter in common) + quantized)
    num_bytes = float(_bytes_of(common) + sum(layout.num_bytes for layout in layouts))
    for module, config in zip(experts, configs, strict=True):
        one_expert = _MATRICES * model.config.hidden_size * config.intermediate_size / module.parallel.size
        weights_of_token += config.top_k * one_expert
        used = expected_distinct(config.num_experts, config.top_k, num_tokens)
        of_all = _bytes_of(module.parameters()) + sum(map(_bytes_of_words, module.modules()))
        num_bytes += of_all * used / config.num_experts
    return StepCost(2 * num_tokens * weights_of_token, num_bytes)


def expected_distinct(num_experts: int, top_k: int, num_tokens: int) -> float:
    """How many experts are used by any of the tokens, if each token's are as likely as any others."""
    unused: float = (1 - top_k / num_experts) ** num_tokens
    return num_experts * (1 - unused)


def _bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _bytes_of_words(module: nn.Module) -> int:
    """Of quantized experts' weights, which are no parameters."""
    words = getattr(module, "words", None)
    return words.num_bytes if isinstance(words, WordMatrix) else 0
