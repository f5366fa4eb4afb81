"""How a linear layer stores its weights and multiplies by them.

The layers in linear.py know which part of a matrix they hold; a LinearMethod knows its number format. A
quantized format is another LinearMethod, and models do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn


class LinearWeight(nn.Parameter):
    """A parameter of a linear layer that knows which of its dimensions count output and input features.

    Attributes:
        output_dim, input_dim: the dimension; None where the parameter does not extend along it.
    """

    output_dim: int | None
    input_dim: int | None

    @staticmethod
    def make(data: torch.Tensor, *, output_dim: int | None, input_dim: int | None) -> LinearWeight:
        """A parameter of inference only, around `data`."""
        weight = LinearWeight(data, requires_grad=False)
        weight.output_dim, weight.input_dim = output_dim, input_dim
        return weight


class LinearMethod(ABC):
    """Creates, finishes and applies the weights of any number of linear layers; has no state of its own."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Registers the parameters of this rank's [out_features, in_features] on the layer, unfilled."""

    def finish_loading(self, layer: nn.Module) -> None:  # noqa: B027 - most methods have nothing to do
        """Called once when the parameters are filled."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in_features] -> [T, out_features]."""


class DenseMethod(LinearMethod):
    """Plain weights in the model's dtype."""

    def create_weights(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        weight = LinearWeight.make(torch.empty(out_features, in_features), output_dim=0, input_dim=1)
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)  # type: ignore[arg-type]
