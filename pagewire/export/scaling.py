"""Scaling the inputs of matrices without changing what a layer computes.

A matrix whose inputs are x gives the same outputs for x / s when its columns are multiplied by s. What makes
x takes the division: the norm before it, or the rows of the matrix before it. So the channels that matter
most can be made larger where they are rounded (AWQ, arXiv:2306.00978), or outliers of activations smaller
(SmoothQuant, arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from pagewire.export.layer import Layer, Matrix
from pagewire.export.statistics import InputKey, InputStatistics

# A layer's tensors by their names in the checkpoint, fp32 on the device that computes.
Weights = dict[str, torch.Tensor]


class Absorber(Protocol):
    """What is before a matrix and takes the division."""

    def divide(self, weights: Weights, scales: torch.Tensor) -> torch.Tensor:
        """Divides by scales [K] what it makes.

        Returns:
            What it was really divided by, once its own number format has rounded it, [K].
        """
        ...


@dataclass(frozen=True, slots=True)
class NormAbsorber:
    """A norm.

    Attributes:
        weight, bias: names of its tensors; the bias is "" where it has none.
        dtype: that they are stored in.
        one_plus: whether the weight is stored less one.
    """

    weight: str
    bias: str
    dtype: torch.dtype
    one_plus: bool

    def divide(self, weights: Weights, scales: torch.Tensor) -> torch.Tensor:
        shift = 1.0 if self.one_plus else 0.0
        before = weights[self.weight] + shift
        stored = (before / scales - shift).to(self.dtype).float()
        after = stored + shift
        weights[self.weight] = stored
        exact = torch.where((after != 0) & (before != 0), before / after, torch.ones_like(scales))
        if self.bias:
            weights[self.bias] = weights[self.bias] / exact
        return exact


@dataclass(frozen=True, slots=True)
class RowsAbsorber:
    """Rows of a matrix that is quantized itself, so that their scales take the division.

    Attributes:
        matrix, part: which rows.
        repeats: how many of the next matrix's inputs each is, in blocks of `block`: the query heads that
            share a value head.
    """

    matrix: Matrix
    part: str
    repeats: int = 1
    block: int = 1

    def divide(self, weights: Weights, scales: torch.Tensor) -> torch.Tensor:
        own = scales.view(-1, self.repeats, self.block)[:, 0].flatten()
        rows = self.matrix.rows(self.part).to(own.device)
        weights[self.matrix.weight][rows] /= own[:, None]
        bias = weights.get(f"{self.matrix.module}.bias")
        if bias is not None:
            bias[rows] /= own
        return scales

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of values [K] over inputs that must have the same scale, [K]."""
        blocks = values.view(-1, self.repeats, self.block)
        return blocks.mean(1, keepdim=True).expand_as(blocks).flatten()


@dataclass(frozen=True, slots=True)
class ScaledInputs:
    """Inputs that can be scaled.

    Attributes:
        consumers: the matrices that read them and are quantized.
        plain: names of weights that read them too and are not.
        absorber: what is before them.
    """

    consumers: tuple[Matrix, ...]
    plain: tuple[str, ...]
    absorber: NormAbsorber | RowsAbsorber

    def scale(
        self, weights: Weights, statistics: Mapping[InputKey, InputStatistics], scales: torch.Tensor
    ) -> None:
        """Multiplies columns by scales [K], divides what is before them, and brings the statistics of the
        inputs to what they are then."""
        exact = self.absorber.divide(weights, scales)
        for name in (*(matrix.weight for matrix in self.consumers), *self.plain):
            weights[name] = weights[name] * exact
        for key in dict.fromkeys(matrix.inputs for matrix in self.consumers):
            if key in statistics:
                known = statistics[key]
                known.gram /= exact[:, None] * exact
                known.magnitudes /= exact
                known.largest /= exact

    def magnitudes(self, statistics: Mapping[InputKey, InputStatistics]) -> torch.Tensor | None:
        """The mean |x| of each input, [K]; None where no text had any."""
        known = self._known(statistics)
        if not known:
            return None
        mean = torch.stack([each.magnitudes for each in known]).sum(0) / sum(each.count for each in known)
        return self._shared(mean)

    def largest(self, statistics: Mapping[InputKey, InputStatistics]) -> torch.Tensor | None:
        """The largest |x| of each input, [K]; None where no text had any."""
        known = self._known(statistics)
        return self._shared(torch.stack([each.largest for each in known]).amax(0)) if known else None

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """Values [K], the same wherever inputs must have the same scale."""
        return self._shared(values)

    def _shared(self, values: torch.Tensor) -> torch.Tensor:
        return self.absorber.shared(values) if isinstance(self.absorber, RowsAbsorber) else values

    def _known(self, statistics: Mapping[InputKey, InputStatistics]) -> list[InputStatistics]:
        keys = dict.fromkeys(matrix.inputs for matrix in self.consumers)
        return [statistics[key] for key in keys if key in statistics]


def scalable_inputs(
    layer: Layer, matrices: Sequence[Matrix], config: ModelConfig, names: CheckpointNames
) -> Iterator[ScaledInputs]:
    """All inputs of a layer's matrices that can be scaled."""
    by_layer: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_layer.setdefault(matrix.layer.partition(f".{layer.index}.")[2], []).append(matrix)
    attention = by_layer.get("self_attn.qkv_proj", [])
    feed_forward = [
        matrix
        for name in ("mlp.gate_up_proj", "mlp.shared_expert.gate_up_proj", "mlp.experts.gate_up_proj")
        for matrix in by_layer.get(name, [])
    ]
    routers = tuple(f"{module}.weight" for module in layer.routers())
    if config.norm_inputs and config.parallel_residual:
        yield _after_norm(layer, names, config, "attn_norm", [*attention, *feed_forward], routers)
    elif config.norm_inputs:
        yield _after_norm(layer, names, config, "attn_norm", attention, ())
        yield _after_norm(layer, names, config, "mlp_norm", feed_forward, routers)
    yield from _of_values(attention, by_layer.get("self_attn.o_proj", []), config)
    experts = config.layers[layer.index].experts
    if experts is None or experts.activation.kind != "clamped":  # in which outputs are not proportional to up
        downs = [each for name, found in by_layer.items() if name.endswith("down_proj") for each in found]
        yield from _of_products(feed_forward, downs)


def _after_norm(
    layer: Layer,
    names: CheckpointNames,
    config: ModelConfig,
    norm: str,
    consumers: Sequence[Matrix],
    plain: tuple[str, ...],
) -> ScaledInputs:
    name = f"model.layers.{layer.index}.{norm}"
    stored = {each.name: each for each in layer.tensors}
    weight, bias = names.tensor(name, "weight"), names.tensor(name, "bias")
    absorber = NormAbsorber(
        weight, bias if bias in stored else "", stored[weight].dtype, config.norm.one_plus
    )
    return ScaledInputs(tuple(consumers), plain, absorber)


def _of_values(
    attention: Sequence[Matrix], outputs: Sequence[Matrix], config: ModelConfig
) -> Iterator[ScaledInputs]:
    values = next((matrix for matrix in attention if "v" in matrix.parts), None)
    if values is None or not outputs:
        return
    repeats = config.num_attention_heads // config.num_key_value_heads
    yield ScaledInputs(tuple(outputs), (), RowsAbsorber(values, "v", repeats, config.head_dim))


def _of_products(ups: Sequence[Matrix], downs: Sequence[Matrix]) -> Iterator[ScaledInputs]:
    for down in downs:
        parent = down.layer.rpartition(".")[0]
        for up in ups:
            is_same = up.layer.rpartition(".")[0] == parent and up.expert == down.expert
            if is_same and "up" in up.parts:
                yield ScaledInputs((down,), (), RowsAbsorber(up, "up"))
