"""Quantized matrices as the tensors that checkpoints hold, by the part of their names behind the module's.

The layouts are AutoAWQ's "gemm", AutoGPTQ's first version and compressed-tensors' "float-quantized" and
"int-quantized"; docs/quantization.md lists what reads them.
"""

from __future__ import annotations

import torch

from pagewire.export.integers import IntegerMatrix, in_groups

_WORD = 32
# The column whose value each place of a word has, from the lowest bits on.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
LARGEST_E4M3 = 448.0
_LARGEST_INT8 = 127
_SMALLEST_SCALE = 1e-12

Tensors = dict[str, torch.Tensor]


def awq_tensors(matrix: IntegerMatrix) -> Tensors:
    """qweight int32 [K, N / 8] and qzeros int32 [G, N / 8] packed along the outputs, scales fp16 [G, N]."""
    return {
        "qweight": _words(_awq_order(matrix.codes.T), 4),
        "qzeros": _words(_awq_order(matrix.grid.zeros.T), 4),
        "scales": matrix.grid.scales.T.half().contiguous(),
    }


def gptq_tensors(matrix: IntegerMatrix) -> Tensors:
    """qweight int32 [K * bits / 32, N] packed along the inputs, qzeros int32 [G, N * bits / 32] along the
    outputs, scales fp16 [G, N], g_idx int32 [K].

    Zero points are stored less one, as the first version of the format has them: its code added the one when
    it read them.
    """
    grid = matrix.grid
    in_features = matrix.codes.shape[1]
    stored_zeros = (grid.zeros - 1) % 2**grid.bits
    return {
        "qweight": _words(matrix.codes, grid.bits).T.contiguous(),
        "qzeros": _words(stored_zeros.T, grid.bits),
        "scales": grid.scales.T.half().contiguous(),
        "g_idx": (torch.arange(in_features, device=matrix.codes.device) // grid.group_size).int(),
    }


def fp8_tensors(weight: torch.Tensor) -> Tensors:
    """weight [N, K] fp32 -> e4m3, rounded to nearest, with a scale for each output, weight_scale [N, 1]."""
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST_E4M3).clamp(min=_SMALLEST_SCALE)
    codes = (weight / scales).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}


def int8_tensors(weight: torch.Tensor) -> Tensors:
    """weight [N, K] fp32 -> int8, rounded to nearest, with a scale for each output, weight_scale [N, 1]."""
    scales = (weight.abs().amax(1, keepdim=True) / _LARGEST_INT8).clamp(min=_SMALLEST_SCALE)
    return {"weight": (weight / scales).round().to(torch.int8), "weight_scale": scales}


def _awq_order(values: torch.Tensor) -> torch.Tensor:
    """[R, N] with the columns of each 8 in the order in which AutoAWQ's words have them."""
    words: torch.Tensor = in_groups(values, 8)[..., list(_AWQ_COLUMNS)]
    return words.flatten(1)


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of whole numbers below 2 ** bits, 32 / bits to a word from the lowest bits on: [R, C] -> int32
    [R, C * bits / 32]."""
    fields = in_groups(values.long(), _WORD // bits)
    shifts = torch.arange(0, _WORD, bits, device=values.device)
    words = (fields << shifts).sum(-1)
    # Two's complement of 32 bits by hand: a conversion of larger numbers is not defined.
    return torch.where(words >= 2**31, words - 2**32, words).int()
