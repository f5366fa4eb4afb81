"""Which layers each pipeline stage has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.layers.parallel import SplitError
from engine.models.config import LayerConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a pipeline. The default is the only one.

    Attributes:
        index, count: its place, and how many there are.
        layers: its layers, by their numbers; None for all.
    """

    index: int = 0
    count: int = 1
    layers: range | None = None

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes logits and samples."""
        return self.index == self.count - 1

    def own(self, num_layers: int) -> range:
        """The numbers of its layers."""
        return range(num_layers) if self.layers is None else self.layers


def stage_of(config: ModelConfig, index: int, count: int) -> Stage:
    """A stage of a model that is cut so that the slowest stage is as fast as it can be.

    A layer's cost is estimated by its weights, which is what a decode reads and what a prompt multiplies by.
    The last stage has the output projection too, which computes a token of each request, as decodes do.

    Raises:
        SplitError: there are fewer layers than stages.
    """
    if count == 1:
        return Stage()
    if len(config.layers) < count:
        raise SplitError(f"the model has {len(config.layers)} layers, too few for {count} pipeline stages")
    head = config.vocab_size * config.hidden_size if config.has_lm_head else 0
    ends = cut([_weights(config, layer) for layer in config.layers], head, count)
    return Stage(index, count, range(0 if index == 0 else ends[index - 1], ends[index]))


def _weights(config: ModelConfig, layer: LayerConfig) -> int:
    """Numbers in a layer's matrices; of experts, of those that a batch of some size uses, which is all."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * heads * config.head_dim
    channels = config.intermediate_size
    if layer.experts is not None:
        experts = layer.experts
        channels = experts.num_experts * experts.intermediate_size + experts.shared_size
    return attention + 3 * config.hidden_size * channels


def cut(costs: Sequence[int], last: int, count: int) -> list[int]:
    """Where each of `count` stages ends, each with at least one layer, so that the most that a stage costs is
    the least there can be.

    Args:
        costs: of each layer.
        last: what the last stage costs besides its layers.
    """
    sums = [0, *accumulate(costs)]
    num_layers = len(costs)
    # best[n]: for the first n layers in the stages so far, (the most that one costs, where they end)
    best: list[tuple[int, list[int]]] = [(sums[end], [end]) for end in range(num_layers + 1)]
    for stage in range(1, count):
        more = last if stage == count - 1 else 0
        found: list[tuple[int, list[int]]] = []
        for end in range(num_layers + 1):
            options = [
                (max(best[begin][0], sums[end] - sums[begin] + more), [*best[begin][1], end])
                for begin in range(stage, end)
            ]
            found.append(min(options, default=(sums[-1] + last + 1, [end] * (stage + 1))))
        best = found
    return best[num_layers][1]
