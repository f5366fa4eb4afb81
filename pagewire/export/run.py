"""The export of a model: its layers one after the other, so that no more than one is in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.loader.backbone import names_in
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.stream import StoredTensor
from engine.lora.reader import read_adapter
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.models.families import load_model_config
from engine.platform.device import dtype_name, pick_device
from pagewire.base.errors import ConfigError
from pagewire.export.calibration import calibration_tokens
from pagewire.export.config import DEFAULT_GROUP_SIZES, GROUPED, ExportConfig
from pagewire.export.dequantized import DequantizedSource
from pagewire.export.formats import quantization_config
from pagewire.export.layer import Layer, LayerBuilder, Matrix
from pagewire.export.merged import MergedSource
from pagewire.export.methods import Awq, Fp8, Gptq, Int8, LayerWork, Method
from pagewire.export.output import OutputDirectory
from pagewire.export.progress import Report, layer_progress
from pagewire.export.safetensors_file import Entry
from pagewire.export.source import CheckpointSource, Source, as_dtype, size_in, under
from pagewire.hub import resolve_model
from pagewire.hub.model_files import read_json_object

# Computed at a time.
_TOKENS_AT_ONCE = 4096
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written.

    Attributes:
        path: the directory.
        num_bytes: of weights.
        summary: what they are, such as "awq, 4 bits in groups of 64".
    """

    path: Path
    num_bytes: int
    summary: str


@dataclass(slots=True)
class Model:
    """What is exported.

    Attributes:
        directory: its files.
        config: its configuration.
        names: what its checkpoint calls modules.
        source: its tensors.
        dtype: what tensors that are not quantized are written in; None for what they are.
        changes: what config.json is to say differently.
    """

    directory: Path
    config: ModelConfig
    names: CheckpointNames
    source: Source
    dtype: torch.dtype | None
    changes: dict[str, Any]

    def layer_tensors(self, index: int) -> list[StoredTensor]:
        """The tensors of a decoder layer."""
        return list(under(self.source.tensors, self.names.module(f"model.layers.{index}") + "."))

    def other_tensors(self) -> list[StoredTensor]:
        """Those outside the layers."""
        prefixes = tuple(
            self.names.module(f"model.layers.{index}") + "." for index in range(len(self.config.layers))
        )
        return [each for each in self.source.tensors if not each.name.startswith(prefixes)]


def export_hf(config: ExportConfig) -> Exported:
    """Exports to a directory in Hugging Face layout.

    Raises:
        ConfigError: a setting, the model or the data set is wrong, or the disk is too full.
    """
    model = open_model(config)
    layers = _Layers(config, model)
    output = OutputDirectory.open(config, model.directory, len(model.config.layers) + 1)
    layers.require_space(output)
    with torch.inference_mode():
        layers.write(output)
    values = _config_json(config, model, layers)
    num_bytes = output.finish(model.directory, values)
    return Exported(config.out, num_bytes, layers.summary)


def open_model(config: ExportConfig) -> Model:
    """Finds the model and looks at its files.

    Raises:
        ConfigError: it is not there, or cannot be exported.
    """
    directory = resolve_model(config.model, progress=True)
    model_config = load_model_config(directory)
    checkpoint = open_checkpoint(directory)
    names = names_in(checkpoint, model_config)
    dtype = _DTYPES.get(config.dtype)
    if dtype is None and _has_blocks(checkpoint):
        dtype = torch.bfloat16
    source: Source
    if model_config.quantization is None:
        source = CheckpointSource(checkpoint, torch.float32)
    else:
        plain = _DTYPES.get(model_config.dtype, torch.bfloat16)
        source = DequantizedSource(checkpoint, model_config, names, plain)
    changes: dict[str, Any] = {}
    if config.merge_lora is not None:
        adapter = read_adapter(Path(config.merge_lora).expanduser())
        source = merged = MergedSource(source, adapter, model_config, names)
        if merged.unties:
            changes["tie_word_embeddings"] = False
            model_config = replace(model_config, tie_word_embeddings=False)
    return Model(directory, model_config, names, source, dtype, changes)


def _has_blocks(checkpoint: Checkpoint) -> bool:
    return any(stored.blocks for tensors in checkpoint.files.values() for stored in tensors)


class _Layers:
    """The layers of a model, and what becomes of them.

    Raises:
        ConfigError: tensors are missing, or matrices do not fit the method.
    """

    def __init__(self, config: ExportConfig, model: Model) -> None:
        self._config, self._model = config, model
        self._num_layers = len(model.config.layers)
        shapes = LayerBuilder(model.config, model.names, torch.device("meta"), config.sample_length)
        self.matrices: list[Matrix] = []
        self.plain = [model.names.module("lm_head")]
        for index in range(self._num_layers):
            layer = shapes.make(index, model.layer_tensors(index), str(model.directory))
            self.matrices += layer.matrices()
            self.plain += layer.routers()
        self.group_size = -1
        self.method: Method | None = None
        if config.quant_method is not None:
            self._check_experts()
            self.group_size = _group_size(config, self.matrices)
            _require_words(config, self.matrices)
            self.method = self._make_method()

    @property
    def summary(self) -> str:
        """What is written, for people."""
        config = self._config
        if config.quant_method is None:
            return "plain weights"
        groups = ""
        if config.quant_method in GROUPED:
            groups = (
                f" in groups of {self.group_size}" if self.group_size > 0 else ", a scale for each output"
            )
        return f"{config.quant_method}, {config.bits} bits{groups}"

    def require_space(self, output: OutputDirectory) -> None:
        """Raises ConfigError if the disk is too full."""
        model, config = self._model, self._config
        quantized = {matrix.weight for matrix in self.matrices} if self.method else set()
        needed = 0
        for stored in model.source.tensors:
            size = size_in(stored, torch.int8 if stored.name in quantized else model.dtype)
            # Scales and zero points take less than a bit a weight.
            needed += size * (config.bits + 1) // 8 if stored.name in quantized else size
        if self.method is not None and self.method.needs_texts:
            # Two layers' activations.
            needed += 2 * config.num_samples * config.sample_length * model.config.hidden_size * 4
        needed -= sum(path.stat().st_size for path in output.path.glob("*.safetensors"))
        free = shutil.disk_usage(output.path).free
        if needed > free:
            raise ConfigError(
                f"the export needs {needed / 1e6:,.0f} MB in {output.path}, and {free / 1e6:,.0f} MB are "
                "free; free some space or name a directory on another disk",
                param="out",
            )

    def write(self, output: OutputDirectory) -> None:
        """Writes all files that are not there yet."""
        total = self._num_layers + 1
        done = [index for index in range(total) if output.has(index)]
        with layer_progress(self._label(), total, len(done)) as report:
            self._write_layers(output, report)
            if not output.has(self._num_layers):
                output.write(self._num_layers, list(self._plain_entries(self._model.other_tensors())))
            report(total)

    def _label(self) -> str:
        return "copying layers" if self.method is None else "quantizing layers"

    def _write_layers(self, output: OutputDirectory, report: Report) -> None:
        first = next((index for index in range(self._num_layers) if not output.has(index)), None)
        if first is None:
            return
        if self.method is None:
            for index in range(self._num_layers):
                if not output.has(index):
                    output.write(index, list(self._plain_entries(self._model.layer_tensors(index))))
                report(index + 1)
            return
        config, model = self._config, self._model
        device = pick_device(config.device)
        builder = LayerBuilder(model.config, model.names, device, config.sample_length)
        if self.method.needs_texts and output.hidden(first) is None:
            assert first == 0  # what a layer reads is kept before the layer before it is
            self._embed(output)
        for index in range(first, self._num_layers):
            entries = self._quantized(builder, output, index)
            output.write(index, entries)
            output.drop_hidden(index)
            report(index + 1)
        output.drop_hidden(self._num_layers)

    def _embed(self, output: OutputDirectory) -> None:
        """Writes the activations before the first layer."""
        config, model = self._config, self._model
        tokens = calibration_tokens(
            model.directory,
            config.dataset,
            num_samples=config.num_samples,
            length=config.sample_length,
            vocab_size=model.config.vocab_size,
        )
        table = model.source.read(f"{model.names.module('model.embed_tokens')}.weight")
        hidden = output.new_hidden(0, (tokens.size, model.config.hidden_size))
        for begin in range(0, len(tokens), 64):
            ids = torch.from_numpy(tokens[begin : begin + 64].reshape(-1))
            rows = table[ids].float() * model.config.embedding_scale
            at = begin * config.sample_length
            hidden[at : at + len(rows)] = rows.numpy()
        output.keep_hidden(0)

    def _quantized(self, builder: LayerBuilder, output: OutputDirectory, index: int) -> list[Entry]:
        """Quantizes a layer, and keeps what the next one reads."""
        model, method = self._model, self.method
        assert method is not None
        tensors = model.layer_tensors(index)
        layer = builder.make(index, tensors, str(model.directory))
        before = {each.name: each.dtype for each in tensors}
        weights = {
            each.name: model.source.read(each.name).to(builder.device, torch.float32) for each in tensors
        }
        compute = keep = lambda: None
        if method.needs_texts:
            for name, tensor in weights.items():
                layer.load(name, tensor)
            compute = partial(self._compute, layer, output, None, builder.device)
            keep = partial(self._keep, layer, output, builder.device)
        matrices = layer.matrices()
        work = LayerWork(layer, matrices, weights, builder.recorder, compute, keep)
        made = method.quantize(work)
        entries = []
        for name, tensor in weights.items():
            dtype = model.dtype if model.dtype is not None else before[name]
            entries.append(Entry.of(name, tensor.to(dtype)))
        for module, stored in made.items():
            entries += [Entry.of(f"{module}.{part}", tensor) for part, tensor in stored.items()]
        return sorted(entries, key=lambda entry: entry.name)

    def _keep(self, layer: Layer, output: OutputDirectory, device: torch.device) -> None:
        if output.hidden(layer.index + 1) is not None:
            # A run before this one got so far, with the same weights; it has the same numbers.
            self._compute(layer, output, None, device)
            return
        before = output.hidden(layer.index)
        assert before is not None
        self._compute(layer, output, output.new_hidden(layer.index + 1, before.shape), device)
        output.keep_hidden(layer.index + 1)

    def _compute(
        self,
        layer: Layer,
        output: OutputDirectory,
        into: npt.NDArray[np.float32] | None,
        device: torch.device,
    ) -> None:
        """Computes a layer for all texts."""
        hidden = output.hidden(layer.index)
        assert hidden is not None
        length = self._config.sample_length
        step = max(1, _TOKENS_AT_ONCE // length) * length
        for begin in range(0, len(hidden), step):
            part = torch.from_numpy(hidden[begin : begin + step].copy()).to(device)
            made = layer.run(part, length)
            if into is not None:
                into[begin : begin + step] = made.cpu().numpy()

    def _plain_entries(self, tensors: Sequence[StoredTensor]) -> Iterator[Entry]:
        for stored in tensors:
            is_number = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
            dtype = self._model.dtype if self._model.dtype is not None and is_number else stored.dtype
            yield Entry(stored.name, dtype, stored.shape, self._reading(stored.name))

    def _reading(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: as_dtype(self._model.source.read(name), self._model.dtype)

    def _check_experts(self) -> None:
        """Raises ConfigError for experts that lie in one tensor: quantized formats have no place for it."""
        found = {matrix.module for matrix in self.matrices}
        for index, layer in enumerate(self._model.config.layers):
            if layer.experts is None:
                continue
            name = f"model.layers.{index}.mlp.experts.down_proj"
            if not any(matrix.layer == name for matrix in self.matrices):
                raise ConfigError(
                    f"{self._model.directory}: the experts of layer {index} are one tensor for all of them, "
                    "which quantized layouts have no place for; supported are experts with a matrix each "
                    f"({len(found)} other matrices are fine)"
                )

    def _make_method(self) -> Method:
        config, model = self._config, self._model
        if config.quant_method == "awq":
            return Awq(model.config, model.names, self.group_size)
        if config.quant_method == "gptq":
            return Gptq(config.bits, self.group_size)
        return Fp8() if config.quant_method == "fp8" else Int8(model.config, model.names)


def _group_size(config: ExportConfig, matrices: Sequence[Matrix]) -> int:
    """The group size that is asked for, or the largest of the usual ones that divides all inputs.

    Raises:
        ConfigError: it does not divide those of a matrix.
    """
    if config.quant_method not in GROUPED:
        return -1
    wanted = config.group_size
    if wanted == -1:
        return -1
    fitting = [size for size in DEFAULT_GROUP_SIZES if all(each.shape[1] % size == 0 for each in matrices)]
    if wanted is None:
        return fitting[0] if fitting else -1
    for matrix in matrices:
        if matrix.shape[1] % wanted:
            allowed = ", ".join(map(str, (*fitting, -1)))
            raise ConfigError(
                f"group_size is {wanted}, which does not divide the {matrix.shape[1]} inputs of "
                f"{matrix.module}; for this model it may be {allowed}",
                param="group_size",
            )
    return wanted


def _require_words(config: ExportConfig, matrices: Sequence[Matrix]) -> None:
    """Raises ConfigError if a matrix does not fill the words of integer formats."""
    if config.quant_method not in GROUPED:
        return
    unit = 32 // config.bits
    for matrix in matrices:
        if matrix.shape[0] % unit or matrix.shape[1] % unit:
            raise ConfigError(
                f"{matrix.module} has {matrix.shape[0]} outputs and {matrix.shape[1]} inputs; for "
                f"{config.quant_method} with {config.bits} bits both must be multiples of {unit}"
            )


def _config_json(config: ExportConfig, model: Model, layers: _Layers) -> dict[str, Any]:
    """config.json of what was written."""
    values = read_json_object(model.directory / "config.json")
    values.pop("quantization_config", None)
    values |= model.changes
    if model.dtype is not None:
        name = "dtype" if "dtype" in values else "torch_dtype"
        values[name] = dtype_name(model.dtype)
    if layers.method is not None:
        values["quantization_config"] = quantization_config(
            config, layers.group_size, layers.plain, model.names.others
        )
    return values
