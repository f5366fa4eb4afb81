"""What the calibration text puts into each matrix, summed up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.layers.experts import ExpertWeights
from engine.layers.linear_method import DenseMethod
from engine.layers.looped_experts import DenseExperts

# A layer's full name in our models, and the expert whose matrix it is; None where there are none.
InputKey = tuple[str, int | None]


@dataclass(slots=True)
class InputStatistics:
    """Of the inputs x [T, K] that a matrix was multiplied with.

    Attributes:
        gram: the sum of x^T x, fp32 [K, K].
        magnitudes: the sum of |x|, fp32 [K].
        largest: the largest |x|, fp32 [K].
        count: T.
    """

    gram: torch.Tensor
    magnitudes: torch.Tensor
    largest: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> InputStatistics:
        """Of no inputs."""
        gram = torch.zeros(in_features, in_features, device=device)
        return cls(gram, torch.zeros(in_features, device=device), torch.zeros(in_features, device=device))

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs [T, K] fp32."""
        self.gram.addmm_(x.T, x)
        magnitudes = x.abs()
        self.magnitudes += magnitudes.sum(0)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self.count += len(x)


class Recorder:
    """Sums up the inputs of those matrices that are asked for."""

    def __init__(self) -> None:
        self.statistics: dict[InputKey, InputStatistics] = {}
        self._wanted: frozenset[InputKey] = frozenset()

    def watch(self, keys: Iterable[InputKey]) -> None:
        """Forgets what was summed up, and sums up these from now on."""
        self.statistics = {}
        self._wanted = frozenset(keys)

    def see(self, key: InputKey, x: torch.Tensor) -> None:
        """A matrix is multiplied with x [T, K]."""
        if key not in self._wanted or len(x) == 0:
            return
        if key not in self.statistics:
            self.statistics[key] = InputStatistics.empty(x.shape[1], x.device)
        self.statistics[key].add(x)


class RecordedMethod(DenseMethod):
    """Plain weights, whose inputs a recorder sees."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._recorder.see((str(layer.layer_name), None), x)
        return super().apply(layer, x, bias)


class RecordedExperts(DenseExperts):
    """Plain weights of experts, whose inputs a recorder sees."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def multiply(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self._recorder.see((weights.layer_name, expert), x)
        return super().multiply(weights, expert, x, bias)
