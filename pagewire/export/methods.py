"""What each method of quantization does with one decoder layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from pagewire.export import awq, gptq, smoothquant
from pagewire.export.integers import IntegerMatrix
from pagewire.export.layer import Layer, Matrix
from pagewire.export.packing import Tensors, awq_tensors, fp8_tensors, gptq_tensors, int8_tensors
from pagewire.export.scaling import Weights, scalable_inputs
from pagewire.export.statistics import Recorder


@dataclass(slots=True)
class LayerWork:
    """A layer under way.

    Attributes:
        layer: built, its weights loaded.
        matrices: those to quantize.
        weights: all its tensors; methods change them.
        recorder: sees the inputs of the layer's matrices.
        compute: computes the layer for all texts.
        keep: computes it for all texts and keeps what comes out for the next layer.
    """

    layer: Layer
    matrices: Sequence[Matrix]
    weights: Weights
    recorder: Recorder
    compute: Callable[[], None]
    keep: Callable[[], None]


class Method(ABC):
    """Quantizes one layer after the other.

    Attributes:
        needs_texts: whether it looks at activations.
    """

    needs_texts = True

    @abstractmethod
    def quantize(self, work: LayerWork) -> dict[str, Tensors]:
        """The tensors of each quantized matrix, by the matrix's module. What else of `work.weights` was
        changed is to be written as it is there."""


class Awq(Method):
    """See awq.py. Activations are those of the layer before it was quantized."""

    def __init__(self, config: ModelConfig, names: CheckpointNames, group_size: int) -> None:
        self._config, self._names, self._group_size = config, names, group_size

    def quantize(self, work: LayerWork) -> dict[str, Tensors]:
        work.recorder.watch(matrix.inputs for matrix in work.matrices)
        work.keep()
        statistics, weights = work.recorder.statistics, work.weights
        for inputs in scalable_inputs(work.layer, work.matrices, self._config, self._names):
            group_size = _group_size(self._group_size, inputs.consumers[0])
            scales = awq.search_scales(inputs, weights, statistics, group_size)
            if scales is not None:
                inputs.scale(weights, statistics, scales)
        made = {}
        for matrix in work.matrices:
            known = statistics.get(matrix.inputs)
            gram = None if known is None else known.gram
            group_size = _group_size(self._group_size, matrix)
            integers = awq.quantize(matrix, weights.pop(matrix.weight), gram, group_size)
            made[matrix.module] = awq_tensors(integers)
        return made


class Gptq(Method):
    """See gptq.py. The matrices of a layer are quantized for what it makes of the layers before it once those
    are quantized."""

    def __init__(self, bits: int, group_size: int) -> None:
        self._bits, self._group_size = bits, group_size

    def quantize(self, work: LayerWork) -> dict[str, Tensors]:
        made: dict[str, Tensors] = {}
        work.recorder.watch(matrix.inputs for matrix in work.matrices)
        work.compute()
        for matrix in work.matrices:
            known = work.recorder.statistics.get(matrix.inputs)
            gram = None if known is None else known.gram
            integers = self._matrix(matrix, work.weights.pop(matrix.weight), gram)
            made[matrix.module] = gptq_tensors(integers)
            work.layer.load(matrix.weight, integers.weight())
        work.recorder.watch(())
        work.keep()
        return made

    def _matrix(self, matrix: Matrix, weight: torch.Tensor, gram: torch.Tensor | None) -> IntegerMatrix:
        return gptq.quantize(weight, gram, self._bits, _group_size(self._group_size, matrix))


class Fp8(Method):
    """Weights are rounded to the nearest e4m3."""

    needs_texts = False

    def quantize(self, work: LayerWork) -> dict[str, Tensors]:
        return _each(work, fp8_tensors)


class Int8(Method):
    """See smoothquant.py. Weights are rounded to the nearest integers."""

    def __init__(self, config: ModelConfig, names: CheckpointNames) -> None:
        self._config, self._names = config, names

    def quantize(self, work: LayerWork) -> dict[str, Tensors]:
        work.recorder.watch(matrix.inputs for matrix in work.matrices)
        work.keep()
        statistics, weights = work.recorder.statistics, work.weights
        for inputs in scalable_inputs(work.layer, work.matrices, self._config, self._names):
            scales = smoothquant.smoothing_scales(inputs, weights, statistics)
            if scales is not None:
                inputs.scale(weights, statistics, scales)
        return _each(work, int8_tensors)


def _each(work: LayerWork, quantize: Callable[[torch.Tensor], Tensors]) -> dict[str, Tensors]:
    return {matrix.module: quantize(work.weights.pop(matrix.weight)) for matrix in work.matrices}


def _group_size(group_size: int, matrix: Matrix) -> int:
    return matrix.shape[1] if group_size == -1 else group_size
