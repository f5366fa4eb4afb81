"""AWQ: scales that protect the weights which matter to activations (arXiv:2306.00978).

For each set of inputs that can be scaled, a grid of candidates s = |x|^r / |w|^(1 - r), and s = |x|^r, is
searched for the one whose rounded matrices change the outputs least; then the range of each group of weights
is clipped if that helps. Both are as in the authors' code, https://github.com/mit-han-lab/llm-awq, but for
how the change is measured: there it is by the outputs for some inputs that are kept, here by the Gram matrix
of all inputs, tr(D X^T X D^T) for the change D of a matrix, which is the same sum over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from pagewire.export.integers import IntegerMatrix, asymmetric_grid, in_groups
from pagewire.export.layer import Matrix
from pagewire.export.scaling import ScaledInputs, Weights
from pagewire.export.statistics import InputKey, InputStatistics

BITS = 4
_STEPS = 20
# Of the rows of a matrix, which are rounded independently, so many tell enough of a candidate.
_SEARCHED_ROWS = 256
# The smallest share of a group's range that is tried, in steps of _STEPS to the whole.
_CLIP_STEPS = _STEPS // 2
_SMALLEST = 1e-4
# Queries and keys are not clipped: what is lost of both is multiplied.
_NOT_CLIPPED = frozenset("qk")


def search_scales(
    inputs: ScaledInputs,
    weights: Weights,
    statistics: Mapping[InputKey, InputStatistics],
    group_size: int,
) -> torch.Tensor | None:
    """The scales [K] of inputs that lose least; None where leaving them as they are does, or nothing is
    known of them."""
    magnitudes = inputs.magnitudes(statistics)
    if magnitudes is None:
        return None
    known = [matrix for matrix in inputs.consumers if matrix.inputs in statistics]
    sampled = [(_some_rows(weights[matrix.weight]), statistics[matrix.inputs].gram) for matrix in known]
    sizes = torch.stack([_relative_size(weight, group_size) for weight, _ in sampled]).mean(0)
    best, least = None, _loss(sampled, None, group_size)
    for scales in _candidates(magnitudes, inputs.shared(sizes)):
        loss = _loss(sampled, scales, group_size)
        if loss < least:
            best, least = scales, loss
    return best


def quantize(
    matrix: Matrix, weight: torch.Tensor, gram: torch.Tensor | None, group_size: int
) -> IntegerMatrix:
    """A matrix [N, K] whose inputs are scaled already, clipped and rounded.

    Args:
        gram: of its inputs [K, K]; None where nothing is known of them.
    """
    if gram is not None and not _NOT_CLIPPED & matrix.parts.keys():
        weight = _clipped(weight, gram, group_size)
    grid = asymmetric_grid(weight, BITS, group_size)
    return IntegerMatrix(grid, grid.codes(weight))


def _candidates(magnitudes: torch.Tensor, sizes: torch.Tensor) -> Iterator[torch.Tensor]:
    for step in range(_STEPS):
        ratio = step / _STEPS
        powered = magnitudes.pow(ratio)
        yield _normalised(powered / (sizes.pow(1 - ratio) + _SMALLEST))
        if step % 2:
            yield _normalised(powered)


def _normalised(scales: torch.Tensor) -> torch.Tensor:
    scales = scales.clamp(min=_SMALLEST)
    scales = scales / (scales.max() * scales.min()).sqrt()
    # A channel that no text uses tells nothing, and one that is used in full need not be infinitely larger.
    return torch.nan_to_num(scales, nan=1.0, posinf=1.0, neginf=1.0)


def _relative_size(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The mean magnitude of each input's weights, each relative to the largest of its group, [K]."""
    groups = in_groups(weight.abs(), group_size)
    relative: torch.Tensor = groups / (groups.amax(-1, keepdim=True) + 1e-6)
    return relative.flatten(1).mean(0)


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    step = max(1, len(weight) // _SEARCHED_ROWS)
    return weight[::step]


def _loss(
    sampled: Sequence[tuple[torch.Tensor, torch.Tensor]], scales: torch.Tensor | None, group_size: int
) -> float:
    """How much rounding changes the outputs of all matrices."""
    return sum(_losses(sampled, scales, group_size))


def _losses(
    sampled: Iterable[tuple[torch.Tensor, torch.Tensor]], scales: torch.Tensor | None, group_size: int
) -> Iterator[float]:
    for weight, gram in sampled:
        scaled = weight if scales is None else weight * scales
        change = asymmetric_grid(scaled, BITS, group_size).rounded(scaled) - scaled
        if scales is not None:
            change = change / scales
        yield float(((change @ gram) * change).sum())


def _clipped(weight: torch.Tensor, gram: torch.Tensor, group_size: int) -> torch.Tensor:
    """The weights [N, K], those of each group no larger than what loses least."""
    num_groups = weight.shape[1] // group_size
    groups = in_groups(weight, group_size)
    blocks = gram.view(num_groups, group_size, num_groups, group_size)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, inputs, inputs]
    largest = groups.abs().amax(-1, keepdim=True)
    best = largest
    least = torch.full_like(largest, torch.inf)
    for step in range(_CLIP_STEPS):
        limit = largest * (1 - step / _STEPS)
        change = _rounded(groups.clamp(-limit, limit), group_size) - groups
        loss = (torch.einsum("ngi,gij->ngj", change, own) * change).sum(-1, keepdim=True)
        better = loss < least
        best, least = torch.where(better, limit, best), torch.where(better, loss, least)
    clipped: torch.Tensor = groups.clamp(-best, best)
    return clipped.flatten(1)


def _rounded(groups: torch.Tensor, group_size: int) -> torch.Tensor:
    flat = groups.flatten(1)
    grid = asymmetric_grid(flat, BITS, group_size)
    return in_groups(grid.rounded(flat), group_size)
