"""GPTQ: rounding one input after the other, and making up for each error with the inputs that are left
(arXiv:2210.17323).

The order is that of the inputs' size, largest first ("act-order"), and the inverse of the Hessian is that of
the authors' code, https://github.com/IST-DASLab/gptq: damped, and by its Cholesky factor. Groups are those of
the inputs' own order, with scales from the weights before any was changed, so that neither a checkpoint nor
the kernels that read it know of the order.
"""

from __future__ import annotations

import torch

from pagewire.export.integers import Grid, IntegerMatrix, in_groups, symmetric_grid

_DAMPING = 0.01
_BLOCK = 128
# Shares of a group's range that are tried for its scale.
_SHRINKS = tuple(1 - step / 40 for step in range(12))


def quantize(weight: torch.Tensor, gram: torch.Tensor | None, bits: int, group_size: int) -> IntegerMatrix:
    """A matrix [N, K].

    Args:
        gram: of its inputs [K, K]; None where nothing is known of them: it is then rounded to nearest.
    """
    if gram is None:
        grid = symmetric_grid(weight, bits, group_size)
        return IntegerMatrix(grid, grid.codes(weight))
    grid = _fitted_grid(weight, gram.diagonal(), bits, group_size)
    return IntegerMatrix(grid, _codes(weight, gram, grid))


def _fitted_grid(weight: torch.Tensor, importance: torch.Tensor, bits: int, group_size: int) -> Grid:
    """The symmetric grid whose range loses least where weights are rounded to nearest, each error weighted by
    its input's mean square."""
    whole = symmetric_grid(weight, bits, group_size)
    best, least = whole.scales, torch.full_like(whole.scales, torch.inf)
    for shrink in _SHRINKS:
        scales = (whole.scales * shrink).half().float()
        grid = Grid(scales, whole.zeros, bits, group_size)
        loss = (grid.rounded(weight) - weight).square_().mul_(importance)
        loss = in_groups(loss, group_size).sum(-1)
        better = loss < least
        best, least = torch.where(better, scales, best), torch.where(better, loss, least)
    return Grid(best, whole.zeros, bits, group_size)


def _codes(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    hessian = gram.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1.0
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    group_of = (torch.arange(weight.shape[1], device=weight.device) // grid.group_size)[order]
    scales, zeros = grid.scales[:, group_of], grid.zeros[:, group_of]
    left = weight[:, order].clone()
    codes = torch.empty_like(left)
    top = 2**grid.bits - 1
    for begin in range(0, left.shape[1], _BLOCK):
        end = min(begin + _BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, begin:end])
        for column in range(begin, end):
            current, scale, zero = left[:, column], scales[:, column], zeros[:, column]
            code = ((current / scale).round_() + zero).clamp_(0, top)
            codes[:, column] = code
            error = (current - (code - zero) * scale) / factor[column, column]
            left[:, column:end].addr_(error, factor[column, column:end], alpha=-1)
            errors[:, column - begin] = error
        left[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    ordered = torch.empty_like(codes)
    ordered[:, order] = codes
    return ordered


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, after damping; more of that where the matrix needs it."""
    damping = _DAMPING
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
