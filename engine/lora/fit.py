"""Fits an adapter to a model: which layer each of its matrices belongs to, and what this rank holds of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.layers.linear import LinearLayer
from engine.layers.linear_weight import MatrixPart
from engine.layers.parallel import FeatureRange
from engine.lora.adapter import Adapter, LoraMatrix
from engine.models.base import CausalLM
from pagewire.base.errors import ConfigError

# Ranks in memory are multiples of this, as kernels multiply by them.
RANK_STEP = 16
_SHOWN = 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """What this rank holds of an adapter for one linear layer, in host memory.

    Attributes:
        a: of each of the layer's matrices, by its index: [r, in features on this rank].
        b: as many: [out features on this rank, r], the scale included.
        offset: added to the outputs, [out features on this rank] fp32; None for nothing.
        magnitude: of DoRA, [out features on this rank] fp32; None without it.
    """

    a: Mapping[int, torch.Tensor]
    b: Mapping[int, torch.Tensor]
    offset: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The largest of any matrix."""
        return max((each.shape[0] for each in self.a.values()), default=0)


@dataclass(frozen=True, slots=True)
class FittedTable:
    """What an adapter does to the token embedding or to the output projection, on this rank.

    Attributes:
        weight: takes the base's place, [vocab, hidden]; None where the base's stays.
        a, b: what is added to it: of an embedding [r, vocab] and [hidden, r], of a projection [r, hidden] and
            [vocab on this rank, r]; the scale is in `b`. None for nothing.
        offset: added to logits, [vocab on this rank].
    """

    weight: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    offset: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter as this rank applies it, in host memory.

    Attributes:
        layers: by the layer's full name in the model.
        embedding, head: None where the adapter leaves them as they are.
        rank: the largest in any layer, rounded up to what kernels multiply by; 0 for none.
        num_bytes: of everything.
    """

    layers: Mapping[str, FittedLayer]
    embedding: FittedTable | None
    head: FittedTable | None
    rank: int
    num_bytes: int

    @property
    def has_tables(self) -> bool:
        """Whether the embedding or the output projection change."""
        return self.embedding is not None or self.head is not None


@dataclass(slots=True)
class _Place:
    """Where a module of a checkpoint is in the model: one matrix of a layer."""

    layer: str
    part: MatrixPart
    bias: torch.Tensor | None


@dataclass(slots=True)
class _Parts:
    a: dict[int, torch.Tensor] = field(default_factory=dict)
    b: dict[int, torch.Tensor] = field(default_factory=dict)
    offset: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


class ModelPlaces:
    """The matrices of a model that adapters can change, by their names in checkpoints.

    Args:
        model: this rank's part of it.
        dtype: of matrices in memory.
    """

    def __init__(self, model: CausalLM, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._is_stage = model.stage.count > 1
        self.linear: dict[str, LinearLayer] = {}
        self.embedding: VocabParallelEmbedding | None = None
        self.head: ParallelLMHead | None = None
        self._matrices: dict[str, _Place] = {}
        self._hidden_size, self._vocab_size = model.config.hidden_size, model.config.vocab_size
        for path, module in model.named_modules():
            if isinstance(module, VocabParallelEmbedding):
                self.embedding = module
                self._embedding_name = _plain(model.names.module(path))
            elif isinstance(module, ParallelLMHead):
                self.head = module
                self._head_name = _plain(model.names.module(path))
            elif isinstance(module, LinearLayer) and ".separate." not in f"{path}.":
                self._add(model, module)
        self._fused = dict(self._fused_of(model))

    def _add(self, model: CausalLM, layer: LinearLayer) -> None:
        self.linear[layer.layer_name] = layer
        for shard, part in layer.parts.items():
            first = sum(part.sizes_before)
            bias = None if layer.bias is None else layer.bias.data[first : first + part.outputs.size]
            name = _plain(model.names.module(layer.layer_name, shard))
            self._matrices[name] = _Place(layer.layer_name, part, bias)

    def _fused_of(self, model: CausalLM) -> Iterator[tuple[str, dict[str, Sequence[int]]]]:
        """Modules that checkpoints fuse -> the matrices in them, with their units; see `CheckpointNames`."""
        layouts = {module: layout(model.config) for module, layout in model.names.split.items()}
        found: dict[str, dict[str, Sequence[int]]] = {}
        for name in self._matrices:
            parent, _, own_name = name.rpartition(".")
            for module, layout in layouts.items():
                if own_name in layout:
                    found.setdefault(f"{parent}.{module}", {})[name] = layout[own_name]
        yield from found.items()

    def fit(self, adapter: Adapter) -> FittedAdapter:
        """This rank's part of an adapter.

        Raises:
            ConfigError: a module of it is not in the model, or has another shape.
        """
        source, parts = adapter.config.source, dict[str, _Parts]()
        unknown = []
        head: dict[str, LoraMatrix] = {}
        for module, matrix in adapter.matrices.items():
            name = _plain(module)
            if self.head is not None and name == self._head_name:
                head[name] = matrix
            elif name in self._matrices:
                self._put(parts, self._matrices[name], matrix, f"{source}: {module}")
            elif name in self._fused:
                self._put_fused(parts, name, matrix, f"{source}: {module}")
            else:
                unknown.append(module)
        unknown += [each for each in adapter.embeddings if _plain(each) != self._name_of_embedding]
        tables = (self._name_of_embedding, self._name_of_head)
        unknown += [each for each in adapter.saved if _plain(each) not in tables]
        for module, bias in adapter.biases.items():
            if not self._put_bias(parts, _plain(module), bias, f"{source}: {module}"):
                unknown.append(module)
        if unknown and not self._is_stage:  # a pipeline stage has some of the model's layers
            raise self._unknown(source, unknown)
        layers = {
            name: FittedLayer(each.a, each.b, each.offset, each.magnitude) for name, each in parts.items()
        }
        embedding = self._fit_embedding(adapter, source)
        fitted_head = self._fit_head(adapter, head, source)
        rank = max((each.rank for each in layers.values()), default=0)
        num_bytes = _bytes(layers, embedding, fitted_head)
        rank = -(-rank // RANK_STEP) * RANK_STEP
        return FittedAdapter(layers, embedding, fitted_head, rank, num_bytes)

    @property
    def _name_of_embedding(self) -> str:
        return self._embedding_name if self.embedding is not None else ""

    @property
    def _name_of_head(self) -> str:
        return self._head_name if self.head is not None else ""

    def _unknown(self, source: str, modules: Sequence[str]) -> ConfigError:
        more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
        known = sorted({name.rpartition(".")[2] for name in (*self._matrices, *self._fused)})
        known += [name for name in (self._name_of_embedding, self._name_of_head) if name]
        return ConfigError(
            f"{source}: the base model has no {', '.join(map(repr, modules[:_SHOWN]))}{more} that an "
            "adapter can "
            f"change; it has {', '.join(known)} in its layers"
        )

    def _put(self, parts: dict[str, _Parts], place: _Place, matrix: LoraMatrix, where: str) -> None:
        """Puts this rank's part of an adapter's matrix to those of its layer."""
        outputs, inputs = place.part.outputs, place.part.inputs
        _require_shape(where, matrix, inputs.total, outputs.total)
        into = parts.setdefault(place.layer, _Parts())
        index = place.part.index
        rows = slice(outputs.first, outputs.first + outputs.size)
        columns = slice(inputs.first, inputs.first + inputs.size)
        into.a[index] = matrix.a[:, columns].to(self._dtype).contiguous()
        into.b[index] = (matrix.b[rows].float() * matrix.scale).to(self._dtype).contiguous()
        if matrix.magnitude is not None:
            if inputs.size != inputs.total:
                raise ConfigError(
                    f"{where}: DoRA needs the length of whole rows, of which each of several ranks has a part"
                )
            into.magnitude = self._vector(place, into.magnitude, matrix.magnitude[rows], default=torch.nan)
        if matrix.bias is not None and inputs.first == 0:  # one of the ranks that are added up
            into.offset = self._vector(place, into.offset, matrix.bias[rows], default=0.0)

    def _vector(
        self, place: _Place, vector: torch.Tensor | None, part: torch.Tensor, *, default: float
    ) -> torch.Tensor:
        """A vector over the outputs of a whole layer, with one matrix's part added to it."""
        layer = self.linear[place.layer]
        if vector is None:
            vector = torch.full((layer.out_features,), default)
        first = sum(place.part.sizes_before)
        held = vector[first : first + len(part)]
        held.copy_(torch.where(held.isnan(), part.float(), held + part.float()))
        return vector

    def _put_fused(self, parts: dict[str, _Parts], name: str, matrix: LoraMatrix, where: str) -> None:
        """One `a` for several matrices: each gets it, and its own rows of `b`."""
        layout = self._fused[name]
        num_units = sum(map(len, layout.values()))
        total = sum(self._matrices[each].part.outputs.total for each in layout)
        if matrix.b.shape[0] != total:
            raise ConfigError(f"{where} has {matrix.b.shape[0]} outputs; the base model's has {total}")
        unit = total // num_units
        for each, units in layout.items():
            rows = torch.cat([torch.arange(number * unit, (number + 1) * unit) for number in units])
            part = LoraMatrix(
                matrix.a,
                matrix.b[rows],
                matrix.scale,
                None if matrix.magnitude is None else matrix.magnitude[rows],
                None if matrix.bias is None else matrix.bias[rows],
            )
            self._put(parts, self._matrices[each], part, where)

    def _put_bias(self, parts: dict[str, _Parts], name: str, bias: torch.Tensor, where: str) -> bool:
        """A trained bias takes the base's place: the difference is added. Returns whether the layer is
        known."""
        layout = {name: [0]} if name in self._matrices else self._fused.get(name)
        if layout is None:
            return False
        num_units = sum(map(len, layout.values()))
        total = sum(self._matrices[each].part.outputs.total for each in layout)
        if bias.numel() != total:
            raise ConfigError(f"{where} has a bias of {bias.numel()} numbers for {total} outputs")
        pieces = bias.flatten().chunk(num_units)
        for each, units in layout.items():
            place = self._matrices[each]
            outputs = place.part.outputs
            if place.part.inputs.first != 0:
                continue  # another rank adds it
            held = torch.cat([pieces[unit] for unit in units])[outputs.first : outputs.first + outputs.size]
            base = torch.zeros(outputs.size) if place.bias is None else place.bias.float().cpu()
            into = parts.setdefault(place.layer, _Parts())
            into.offset = self._vector(place, into.offset, held.float() - base, default=0.0)
        return True

    def _fit_embedding(self, adapter: Adapter, source: str) -> FittedTable | None:
        name = self._name_of_embedding
        matrix, weight = _of(adapter.embeddings, name), _of(adapter.saved, name)
        if matrix is None and weight is None:
            return None
        where, shape = f"{source}: {name}", (self._vocab_size, self._hidden_size)
        self._require_table(where, weight, shape)
        if matrix is None:
            return FittedTable(weight=None if weight is None else weight.to(self._dtype))
        if matrix.magnitude is not None or matrix.bias is not None:
            raise ConfigError(f"{where}: DoRA and biases of embeddings are not supported")
        _require_shape(where, matrix, self._vocab_size, self._hidden_size)
        return FittedTable(
            a=matrix.a.to(self._dtype).contiguous(), b=(matrix.b.float() * matrix.scale).to(self._dtype)
        )

    def _fit_head(self, adapter: Adapter, found: Mapping[str, LoraMatrix], source: str) -> FittedTable | None:
        name = self._name_of_head
        matrix, weight = found.get(name), _of(adapter.saved, name)
        if self.head is None or (matrix is None and weight is None):
            return None
        where, held = f"{source}: {name}", self.head.parts[""].outputs
        self._require_table(where, weight, (held.total, self._hidden_size))
        if matrix is None:
            assert weight is not None
            return FittedTable(weight=_rows(weight, held).to(self._dtype).contiguous())
        if matrix.magnitude is not None:
            raise ConfigError(f"{where}: DoRA of the output projection is not supported")
        _require_shape(where, matrix, self._hidden_size, held.total)
        return FittedTable(
            a=matrix.a.to(self._dtype).contiguous(),
            b=(_rows(matrix.b, held).float() * matrix.scale).to(self._dtype).contiguous(),
            offset=None if matrix.bias is None else _rows(matrix.bias, held).float(),
        )

    def _require_table(self, where: str, weight: torch.Tensor | None, shape: tuple[int, int]) -> None:
        if weight is not None and tuple(weight.shape) != shape:
            raise ConfigError(f"{where} has shape {list(weight.shape)}; the base model's has {list(shape)}")


def _rows(tensor: torch.Tensor, held: FeatureRange) -> torch.Tensor:
    return tensor[held.first : held.first + held.size]


def _require_shape(where: str, matrix: LoraMatrix, inputs: int, outputs: int) -> None:
    if matrix.a.shape[1] != inputs or matrix.b.shape[0] != outputs:
        raise ConfigError(
            f"{where} is for a matrix of {matrix.a.shape[1]} inputs and {matrix.b.shape[0]} outputs; the "
            "base "
            f"model's has {inputs} and {outputs}"
        )


def _plain(module: str) -> str:
    """A module's name without the parts that say that it belongs to the language model of a larger one, which
    differ between versions of transformers."""
    parts = [part for part in module.split(".") if part != "language_model"]
    return ".".join(
        part for index, part in enumerate(parts) if part != "model" or index != 1 or parts[0] != "model"
    )


def _of(values: Mapping[str, T], plain: str) -> T | None:
    return next((value for name, value in values.items() if _plain(name) == plain), None)


def _bytes(layers: Mapping[str, FittedLayer], *tables: FittedTable | None) -> int:
    tensors: list[torch.Tensor | None] = []
    for layer in layers.values():
        tensors += [*layer.a.values(), *layer.b.values(), layer.offset, layer.magnitude]
    for table in tables:
        if table is not None:
            tensors += [table.weight, table.a, table.b, table.offset]
    return sum(each.nbytes for each in tensors if each is not None)


def mapped_tensors(adapter: FittedAdapter, change: Callable[[torch.Tensor], torch.Tensor]) -> FittedAdapter:
    """The same with each tensor changed, such as pinned."""

    def table(given: FittedTable | None) -> FittedTable | None:
        if given is None:
            return None
        tensors = (given.weight, given.a, given.b, given.offset)
        return FittedTable(*(None if each is None else change(each) for each in tensors))

    layers = {
        name: FittedLayer(
            {index: change(tensor) for index, tensor in layer.a.items()},
            {index: change(tensor) for index, tensor in layer.b.items()},
            None if layer.offset is None else change(layer.offset),
            None if layer.magnitude is None else change(layer.magnitude),
        )
        for name, layer in adapter.layers.items()
    }
    return FittedAdapter(
        layers, table(adapter.embedding), table(adapter.head), adapter.rank, adapter.num_bytes
    )
