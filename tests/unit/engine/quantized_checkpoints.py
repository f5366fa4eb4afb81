"""Small checkpoints in each quantized format beside what they stand for, written from descriptions of the
formats: bit by bit, one value after the other, sharing nothing with the engine's readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.unit.engine.tiny_model import CONFIG as TINY
from tests.unit.engine.tiny_model import tensors, write_model

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where column 8c + j is

# A matrix [N, K] -> the tensors of a checkpoint, and the matrix that they stand for.
Quantize = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def stream(values: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of values as rows of little-endian bits, 32 to a word."""
    rows = []
    for row in values.tolist():
        number = sum(int(value) << (bits * index) for index, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def awq_words(values: np.ndarray) -> torch.Tensor:
    """[R, N] -> [R, N / 8]."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for column in range(columns):
        words[:, column // 8] |= values[:, column].astype(np.uint32) << (4 * AWQ_NIBBLE[column % 8])
    return torch.from_numpy(words.view(np.int32))


def integers(
    weight: torch.Tensor, bits: int, group_of: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values [N, K], scales [N, G] that fp16 holds, zeros [N, G])."""
    out_features = len(weight)
    num_groups = int(group_of.max()) + 1
    top = 2**bits - 1
    scales = torch.empty(out_features, num_groups)
    zeros = torch.empty(out_features, num_groups)
    for group in range(num_groups):
        part = weight[:, group_of == group]
        if symmetric:
            scales[:, group] = (part.abs().amax(1) / (top // 2)).half().float()
            zeros[:, group] = 2 ** (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, group] = ((high - low) / top).half().float()
            zeros[:, group] = (-low / scales[:, group]).round().clamp(0, top)
    values = (weight / scales[:, group_of]).round() + zeros[:, group_of]
    return values.clamp(0, top), scales, zeros


def by_position(in_features: int, group_size: int) -> torch.Tensor:
    """The group of each input."""
    return torch.arange(in_features) // (group_size if group_size > 0 else in_features)


def awq(group_size: int) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        groups = by_position(weight.shape[1], group_size)
        values, scales, zeros = integers(weight, 4, groups, symmetric=False)
        stored = {
            "qweight": awq_words(values.T.numpy()),
            "qzeros": awq_words(zeros.T.numpy()),
            "scales": scales.T.half().contiguous(),
        }
        return stored, (values - zeros[:, groups]) * scales[:, groups]

    return quantize


def gptq(
    bits: int, group_size: int, *, symmetric: bool, second_version: bool = False, ordered: bool = False
) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        in_features = weight.shape[1]
        groups = by_position(in_features, group_size)
        if ordered:
            groups = groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
        values, scales, zeros = integers(weight, bits, groups, symmetric=symmetric)
        stored_zeros = zeros if second_version else (zeros - 1) % 2**bits
        stored = {
            "qweight": stream(values.numpy(), bits).T.contiguous(),
            "qzeros": stream(stored_zeros.T.numpy(), bits),
            "scales": scales.T.half().contiguous(),
            "g_idx": groups.int(),
        }
        return stored, (values - zeros[:, groups]) * scales[:, groups]

    return quantize


def packed(bits: int, group_size: int, *, symmetric: bool, ordered: bool = False) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        in_features = weight.shape[1]
        groups = by_position(in_features, group_size)
        if ordered:
            groups = groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
        values, scales, zeros = integers(weight, bits, groups, symmetric=symmetric)
        stored = {
            "weight_packed": stream(values.numpy(), bits),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = stream(zeros.T.numpy(), bits).T.contiguous()
        if ordered:
            stored["weight_g_idx"] = groups.int()
        return stored, (values - zeros[:, groups]) * scales[:, groups]

    return quantize


def int8(*, per_tensor: bool = False, static: bool = False, zero_point: bool = False) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        largest = weight.abs().max().view(1, 1) if per_tensor else weight.abs().amax(1, keepdim=True)
        scales = largest / 127
        values = (weight / scales).round()
        stored = {"weight": values.to(torch.int8), "weight_scale": scales[0] if per_tensor else scales}
        if static:
            stored["input_scale"] = torch.tensor([0.05])
        if zero_point:
            stored["input_zero_point"] = torch.tensor([-7], dtype=torch.int8)
        return stored, values * scales

    return quantize


def fp8(scales: str, *, static: bool = False, name: str = "weight_scale", block: int = 32) -> Quantize:
    """A scale a "tensor", "channel" or "block"."""

    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        out_features, in_features = weight.shape
        if scales == "tensor":
            stored_scales = (weight.abs().max() / 448).float()
            spread = stored_scales.expand(weight.shape)
        elif scales == "channel":
            stored_scales = weight.abs().amax(1, keepdim=True) / 448
            spread = stored_scales.expand(weight.shape)
        else:
            stored_scales = torch.empty(-(-out_features // block), -(-in_features // block))
            spread = torch.empty(weight.shape)
            for i in range(stored_scales.shape[0]):
                for j in range(stored_scales.shape[1]):
                    where = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                    stored_scales[i, j] = weight[where].abs().max() / 448
                    spread[where] = stored_scales[i, j]
        values = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {"weight": values, name: stored_scales.contiguous()}
        if static:
            stored["input_scale"] = torch.tensor(0.02)
        return stored, values.float() * spread

    return quantize


NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0, 0.0795803),
    *(0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0),
)


def nf4(*, nested: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        flat, table = weight.flatten(), torch.tensor(NF4)
        num_blocks = -(-len(flat) // 64)
        block_of = torch.arange(len(flat)) // 64
        absmax = torch.stack([flat[block_of == block].abs().max() for block in range(num_blocks)])
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
        stored = {"weight.quant_map": table}
        if nested:
            offset = float(absmax.mean())
            inner = torch.linspace(-1, 1, 256)
            nested_of = torch.arange(num_blocks) // 256
            less = absmax - offset
            largest = torch.stack([less[nested_of == i].abs().max() for i in range(int(nested_of.max()) + 1)])
            numbers = ((less / largest[nested_of])[:, None] - inner).abs().argmin(1)
            absmax = inner[numbers] * largest[nested_of] + offset
            stored |= {
                "weight.absmax": numbers.to(torch.uint8),
                "weight.nested_absmax": largest,
                "weight.nested_quant_map": inner,
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            stored["weight.absmax"] = absmax
        numbers = ((flat / absmax[block_of])[:, None] - table).abs().argmin(1)
        stored["weight"] = (numbers[0::2] * 16 + numbers[1::2]).to(torch.uint8)[:, None]
        text = json.dumps(state).encode()
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return stored, (table[numbers] * absmax[block_of]).view(weight.shape)

    return quantize


def bnb_int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    largest = weight.abs().amax(1)
    values = (weight / largest[:, None] * 127).round()
    stored = {
        "weight": values.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, values * largest[:, None] / 127


def squeezellm(bits: int, *, sparse: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        out_features, in_features = weight.shape
        at = torch.linspace(0, 1, 2**bits)
        table = torch.quantile(weight, at, dim=1).T.contiguous()
        numbers = (weight[:, :, None] - table[:, None, :]).abs().argmin(-1)
        stored = {
            "qweight": stream(numbers.numpy(), bits).T.contiguous(),
            "lookup_table": table,
        }
        value = table.gather(1, numbers)
        if sparse:
            outliers = torch.where(weight.abs() > weight.abs().quantile(0.97), weight - value, 0.0)
            starts, columns, values = [0], [], []
            for row in outliers:
                columns += row.nonzero().flatten().tolist()
                values += row[row != 0].tolist()
                starts.append(len(columns))
            full = 0.1 * torch.ones(in_features, 2)
            stored |= {
                "rows": torch.tensor(starts, dtype=torch.int32),
                "cols": torch.tensor(columns, dtype=torch.int32),
                "vals": torch.tensor(values),
                "startrows": torch.zeros(10, dtype=torch.int32),
                "full_rows": full,
                "full_row_indices": torch.tensor([3, out_features - 1], dtype=torch.int32),
            }
            value = value + outliers
            value[[3, out_features - 1]] += 0.1
        return stored, value

    return quantize


def rounded_int4(weight: torch.Tensor) -> torch.Tensor:
    """To the nearest of 16 values that a group of 128 inputs, or of 32, spans."""
    groups = by_position(weight.shape[1], 128 if weight.shape[1] % 128 == 0 else 32)
    made = torch.empty_like(weight)
    for group in groups.unique():
        for row in range(len(weight)):
            part = weight[row, groups == group]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = (high - low) / 15
            zero = round(-low / step)
            made[row, groups == group] = ((part / step).round() + zero).clamp(0, 15).sub(zero) * step
    return made


# What weights become that are quantized as they are loaded.
MADE_AT_LOAD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": lambda weight: int8()(weight)[1],
    "fp8": lambda weight: fp8("channel")(weight)[1],
    "int4": rounded_int4,
}


def compressed(
    kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, targets: Any = ("Linear",)
) -> dict[str, Any]:
    """A description by compressed-tensors of one group."""
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Case:
    """A format: what config.json says, and how matrices are written."""

    described: Mapping[str, Any]
    quantize: Quantize
    quantizes_inputs: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)


def write_pair(
    directory: Path,
    case: Case,
    *,
    others: Mapping[str, Quantize | None] | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """Writes a checkpoint in the format, and a plain one of the numbers that it stands for.

    Args:
        others: pieces of modules' names -> how they are quantized instead; None for not at all.
    """
    config = {**CONFIG, **case.changes, **changes}
    return write_both(directory, case, tensors({**TINY, **config}), config, others or {})


def write_both(
    directory: Path,
    case: Case,
    plain: dict[str, torch.Tensor],
    config: dict[str, Any],
    others: Mapping[str, Quantize | None],
) -> tuple[Path, Path]:
    """As write_pair, of these tensors, which become those of the plain checkpoint."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(plain.items()):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or "norm" in name or "embed" in name or module.endswith(("lm_head", "moe.gate")):
            stored[name] = tensor
            continue
        quantize: Quantize | None = case.quantize
        for piece, other in others.items():
            if piece in module:
                quantize = other
        if quantize is None:
            stored[name] = tensor
            continue
        parts, plain[name] = quantize(tensor)
        stored.update({f"{module}.{key}": value for key, value in parts.items()})
    quantized = {**config, "quantization_config": dict(case.described)}
    return (
        write_model(directory / "quantized", stored, **quantized),
        write_model(directory / "plain", plain, **config),
    )
