"""SmoothQuant: outliers of activations become larger weights (arXiv:2211.10438), for W8A8."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pagewire.export.scaling import ScaledInputs, Weights
from pagewire.export.statistics import InputKey, InputStatistics

# How much of the activations' range goes to the weights: the paper's for most models.
MIGRATION = 0.5
_SMALLEST = 1e-5


def smoothing_scales(
    inputs: ScaledInputs, weights: Weights, statistics: Mapping[InputKey, InputStatistics]
) -> torch.Tensor | None:
    """max|x|^a / max|w|^(1 - a) of each input, [K]; None where nothing is known of them."""
    largest = inputs.largest(statistics)
    if largest is None:
        return None
    of_weights = torch.stack([weights[matrix.weight].abs().amax(0) for matrix in inputs.consumers]).amax(0)
    of_weights = inputs.shared(of_weights)
    scales = largest.clamp(min=_SMALLEST).pow(MIGRATION) / of_weights.clamp(min=_SMALLEST).pow(1 - MIGRATION)
    return scales.clamp(min=_SMALLEST)
