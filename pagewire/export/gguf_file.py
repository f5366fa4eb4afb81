"""Writes a GGUF file, one tensor at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from pagewire.base.errors import ConfigError
from pagewire.export.config import ExportConfig
from pagewire.export.gguf_metadata import describe
from pagewire.export.progress import layer_progress
from pagewire.export.run import Exported, Model, open_model
from pagewire.hub.gguf.layout import Arrangement, Plan, Wanted
from pagewire.hub.model_files import read_json_object

_F32, _F16, _Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
# What loses most by few bits, and llama.cpp too keeps in more.
_TABLES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file, [rows..., columns], and what makes it in fp32."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], npt.NDArray[np.float32]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        values, num_bytes = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // values * num_bytes)


def export_gguf(config: ExportConfig) -> Exported:
    """Exports to a GGUF file.

    Raises:
        ConfigError: a setting or the model is wrong, GGUF has no place for it, or the disk is too full.
    """
    out = config.out
    if out.suffix != ".gguf" or out.exists():
        raise ConfigError(f"{out} must be the name of a new file that ends in .gguf", param="out")
    model = open_model(config)
    values = {**read_json_object(model.directory / "config.json"), **model.changes}
    names = frozenset(each.name for each in model.source.tensors)
    described = describe(model.directory, values, model.config, names)
    kind = GGMLQuantizationType[config.gguf_type.upper()]
    tensors = [tensor for plan in described.plans for tensor in _tensors(model, plan, kind)]
    for name, divisors in described.divisors.items():
        tensors.append(_Tensor(name, divisors.shape, _F32, lambda divisors=divisors: divisors))  # type: ignore[misc]
    total = sum(math.prod(tensor.byte_shape) for tensor in tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    if total > shutil.disk_usage(out.parent).free:
        raise ConfigError(f"{out} needs {total / 1e6:,.0f} MB, and the disk has fewer", param="out")
    partial = out.with_name(f".{out.name}.partial")
    writer = GGUFWriter(partial, described.name)
    _add_keys(writer, described.metadata)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.byte_shape, np.dtype(np.uint8), math.prod(tensor.byte_shape), tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with layer_progress("writing tensors", len(tensors), 0) as report:
        for done, tensor in enumerate(tensors, 1):
            made = np.ascontiguousarray(tensor.make(), np.float32).reshape(tensor.shape)
            writer.write_tensor_data(quantize(made, tensor.kind).view(np.uint8))
            report(done)
    writer.close()
    partial.rename(out)
    return Exported(out, total, f"GGUF, {described.name}, matrices in {kind.name}")


def _tensors(model: Model, plan: Plan, kind: GGMLQuantizationType) -> Iterator[_Tensor]:
    """The file's tensors that a plan places."""
    assert plan.arrangement is Arrangement.IN_TURN  # what is packed is of no architecture that is written
    begin = 0
    for wanted in plan.wanted:
        shape = wanted.shapes[0]
        rows = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
        own = _F32 if len(shape) == 1 or "norm" in wanted.name or "_gate_inp" in wanted.name else kind
        if wanted.name in _TABLES and own not in (_F32, _F16, GGMLQuantizationType.BF16):
            own = _Q8_0
        if len(shape) > 1 and shape[-1] % GGML_QUANT_SIZES[own][0]:
            own = _F16
        yield _Tensor(wanted.name, shape, own, _making(model, plan, wanted, begin, rows))
        begin += rows


def _making(
    model: Model, plan: Plan, wanted: Wanted, begin: int, rows: int
) -> Callable[[], npt.NDArray[np.float32]]:
    def make() -> npt.NDArray[np.float32]:
        parts = [model.source.read(target.name).float() for target in plan.targets]
        is_vector = len(wanted.shapes[0]) == 1
        flat = [part.reshape(-1) if is_vector else part.reshape(-1, part.shape[-1]) for part in parts]
        tensor = torch.cat(flat)[begin : begin + rows] - wanted.added
        if wanted.paired_heads:
            pairs = tensor.unflatten(0, (wanted.paired_heads, 2, -1))  # type: ignore[no-untyped-call]
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        made: npt.NDArray[np.float32] = tensor.contiguous().numpy()
        return made

    return make


def _add_keys(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer has it
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
