"""Where each tensor of a GGUF file goes in Hugging Face layout, checked, whatever its number format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from gguf.constants import GGMLQuantizationType

from pagewire.base.errors import ConfigError
from pagewire.base.gguf_blocks import KEPT, block_size
from pagewire.hub.gguf.architectures import ALWAYS, Architecture
from pagewire.hub.gguf.keys import ModelSizes
from pagewire.hub.gguf.reader import GgufFile, GgufTensor
from pagewire.hub.gguf.rope import ROPE_TENSORS

# As many as a checkpoint may have tensors.
_MOST_TENSORS = 2**17
_SHOWN = 3
_SHOWN_LENGTH = 80
# Rotary frequencies that old converters copied; they are computed from config.json.
_IGNORED = ".attn_rot_embd.weight"
# Tensor, as in gguf_architectures -> its sizes, attributes of ModelSizes.
_SHAPES: dict[str, tuple[str, ...]] = {
    "token_embd": ("vocab", "hidden"),  # nosec B105 # no password
    "output": ("vocab", "hidden"),
    "output_norm": ("hidden",),
    "attn_norm": ("hidden",),
    "post_attention_norm": ("hidden",),
    "ffn_norm": ("hidden",),
    "post_ffw_norm": ("hidden",),
    "attn_q": ("query", "hidden"),
    "attn_k": ("key", "hidden"),
    "attn_v": ("key", "hidden"),
    "attn_qkv": ("qkv", "hidden"),
    "attn_output": ("hidden", "query"),
    "attn_sinks": ("heads",),
    "attn_q_norm": ("head_dim",),
    "attn_k_norm": ("head_dim",),
    "ffn_gate": ("inner", "hidden"),
    "ffn_up": ("inner", "hidden"),
    "ffn_down": ("hidden", "inner"),
    "ffn_gate_inp": ("experts", "hidden"),
    "ffn_gate_inp_shexp": ("hidden",),
    "ffn_gate_shexp": ("shared_inner", "hidden"),
    "ffn_up_shexp": ("shared_inner", "hidden"),
    "ffn_down_shexp": ("hidden", "shared_inner"),
}
_EXPERT_SHAPES = {
    "ffn_gate": ("expert_inner", "hidden"),
    "ffn_up": ("expert_inner", "hidden"),
    "ffn_down": ("hidden", "expert_inner"),
}
_HEADS = {"attn_q": "heads", "attn_k": "kv_heads"}
# GGUF has this matrix of one row as a vector.
_ROWS_OF_ONE = {"ffn_gate_inp_shexp"}
# This is a parameter in Hugging Face layout, and no module.
_PARAMETERS = {"attn_sinks"}
MXFP4_GROUP = 32
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
_PLAIN = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the file, and what undoes what llama.cpp's converter did to it.

    Attributes:
        paired_heads: of so many heads the rows (i, j) are to be put at (j, i), i < head_dim / 2, j < 2; 0 for
            rows that stay where they are.
        added: what is to be added to each value.
    """

    tensor: GgufTensor
    paired_heads: int = 0
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor in Hugging Face layout.

    Attributes:
        dtype: as safetensors names it: "F32", or "BF16" and "F16" of matrices; "U8" for a part of what stays
            packed.
        blocks: the format of a matrix whose rows stay in blocks, such as "Q4_K"; its shape is [rows, bytes of
            a row].
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    blocks: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


class Arrangement(Enum):
    """How the rows of a placement's sources make up its targets.

    IN_TURN: one after another.
    ALTERNATING: the first row of each source, the second of each, and so on; a row is a value here.
    MXFP4: for each expert the rows of the sources alternate. Their blocks stay packed: the targets are all
        blocks [experts, rows, groups, 16] and all exponents [experts, rows, groups].
    """

    IN_TURN = auto()
    ALTERNATING = auto()
    MXFP4 = auto()


@dataclass(frozen=True, slots=True)
class Placement:
    """Tensors of the file that together are these targets, which lie one after another."""

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    arrangement: Arrangement = Arrangement.IN_TURN

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that the file must have. `shapes` are those that it may have there."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    paired_heads: int = 0
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement of tensors that have not been looked for yet."""

    wanted: tuple[Wanted, ...]
    targets: tuple[Target, ...]
    arrangement: Arrangement = Arrangement.IN_TURN


def plan_tensors(architecture: Architecture, sizes: ModelSizes, config: dict[str, Any]) -> list[Plan]:
    """Where all tensors of a model are in a GGUF file and in Hugging Face layout.

    Args:
        config: config.json's fields; needed are `tie_word_embeddings` and those that switch biases on.
    """
    return list(_Planner(architecture, sizes, config).plans())


def place_tensors(
    gguf: GgufFile,
    architecture: Architecture,
    sizes: ModelSizes,
    config: dict[str, Any],
    *,
    dequantized: bool = False,
) -> list[Placement]:
    """Every tensor of the file, in the order of the file.

    Args:
        dequantized: whether every number becomes float32. Otherwise matrices in blocks that are computed on
            stay in them, those in 16 bits stay so, and those in other blocks become bfloat16.

    Raises:
        ConfigError: tensors are missing, of the wrong shape, or have no place in the model; it lists them.
    """
    if sizes.layers > len(gguf.tensors):
        raise ConfigError(
            f"{gguf.path}: the metadata asks for {sizes.layers} layers, and there are "
            f"{len(gguf.tensors)} tensors"
        )
    for count, what in (
        (sizes.experts * len(architecture.experts), "matrices of experts"),
        (sizes.heads * len(architecture.head_norms), "norms of heads"),
    ):
        if sizes.layers * count > _MOST_TENSORS:
            raise ConfigError(
                f"{gguf.path}: the metadata asks for {sizes.layers * count} {what}; at most "
                f"{_MOST_TENSORS} are read"
            )
    plans = plan_tensors(architecture, sizes, config)
    _check(gguf, [each for plan in plans for each in plan.wanted])
    _require_mxfp4(gguf, plans)
    order = {name: index for index, name in enumerate(gguf.tensors)}
    plans.sort(key=lambda plan: order[plan.wanted[0].name])
    placements = [
        Placement(
            tuple(Source(gguf.tensors[each.name], each.paired_heads, each.added) for each in plan.wanted),
            plan.targets,
            plan.arrangement,
        )
        for plan in plans
    ]
    return placements if dequantized else [_in_own_format(placement) for placement in placements]


def _in_own_format(placement: Placement) -> Placement:
    """The placement with its matrices in the format that the file has them in, as far as it is kept."""
    is_matrix = all(len(target.shape) == 2 for target in placement.targets)
    if placement.arrangement is not Arrangement.IN_TURN or not is_matrix:
        return placement
    kinds = {source.tensor.type.name for source in placement.sources}
    is_same = len(kinds) == 1 and not any(source.added for source in placement.sources)
    kind = kinds.pop() if is_same else ""
    targets = placement.targets
    if kind in KEPT and all(target.shape[1] % block_size(kind)[0] == 0 for target in targets):
        values, num_bytes = block_size(kind)
        shapes = [(target.shape[0], target.shape[1] // values * num_bytes) for target in targets]
        kept = (
            replace(target, shape=shape, dtype="U8", blocks=kind)
            for target, shape in zip(targets, shapes, strict=True)
        )
        return replace(placement, targets=tuple(kept))
    if kind in _PLAIN or any(source.tensor.type.name in _PLAIN for source in placement.sources):
        dtype = kind or "F32"
    else:
        dtype = "BF16"
    return replace(placement, targets=tuple(replace(target, dtype=dtype) for target in targets))


def _check(gguf: GgufFile, wanted: list[Wanted]) -> None:
    """Every wanted tensor is there, with the right shape, and no other."""
    missing = [each.name for each in wanted if each.name not in gguf.tensors]
    extra = [
        name
        for name in gguf.tensors.keys() - {each.name for each in wanted} - ROPE_TENSORS
        if not name.endswith(_IGNORED)
    ]
    misshapen = [
        f"{each.name} of {gguf.tensors[each.name].shape}, not {each.shapes[0]}"
        for each in wanted
        if each.name in gguf.tensors and gguf.tensors[each.name].shape not in each.shapes
    ]
    faults = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in (
            (missing, "missing"),
            (misshapen, "of the wrong shape"),
            (extra, "without a place in it"),
        )
        if names
    ]
    if faults:
        raise ConfigError(
            f"{gguf.path}: its tensors are not those of the model that the metadata describes: "
            f"{', '.join(faults)}"
        )


def _require_mxfp4(gguf: GgufFile, plans: list[Plan]) -> None:
    for plan in plans:
        for each in plan.wanted if plan.arrangement is Arrangement.MXFP4 else ():
            kind = gguf.tensors[each.name].type
            if kind != GGMLQuantizationType.MXFP4:
                raise ConfigError(
                    f"{gguf.path}: {each.name} is {kind.name}; only experts in MXFP4 can be converted"
                )


def _some(names: list[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in sorted(names)[:_SHOWN]]
    shown = [name if len(name) <= _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..." for name in shown]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")


class _Planner:
    """The tensors that a model needs, and their places."""

    def __init__(self, architecture: Architecture, sizes: ModelSizes, config: dict[str, Any]) -> None:
        self._architecture = architecture
        self._sizes = sizes
        self._tied: bool = config["tie_word_embeddings"]
        self._biased = {
            tensor
            for field, tensors in architecture.biases.items()
            if field == ALWAYS or config[field]
            for tensor in tensors
        }

    def plans(self) -> Iterator[Plan]:
        """Tensors of the file that belong together, and what they become."""
        for tensor, module in self._architecture.outer.items():
            if tensor != "output" or not self._tied:
                yield from self._of_module(module, "", (tensor,))
        for layer in range(self._sizes.layers):
            prefix, path = f"blk.{layer}.", f"{self._architecture.layers}.{layer}"
            for tensor, module in self._architecture.layer.items():
                yield from self._of_module(f"{path}.{module}", prefix, (tensor,))
            for module, tensors in self._architecture.fused.items():
                yield from self._of_module(f"{path}.{module}", prefix, tensors)
            for tensor, module in self._architecture.experts.items():
                yield from self._of_experts(f"{path}.{module}", prefix, tensor)
            for tensor, module in self._architecture.head_norms.items():
                yield self._of_heads(f"{path}.{module}", prefix, tensor)
            for module, tensors in self._architecture.packed.items():
                yield from self._of_packed(f"{path}.{module}", prefix, tensors)

    def _of_module(self, module: str, prefix: str, tensors: tuple[str, ...]) -> Iterator[Plan]:
        """A module's weight and, where it has one, its bias."""
        parts = [self._wanted(prefix, tensor) for tensor in tensors]
        first = parts[0].shapes[0]
        shape = first if len(parts) == 1 else (sum(part.shapes[0][0] for part in parts), *first[1:])
        shape = (1, *shape) if tensors[0] in _ROWS_OF_ONE else shape
        name = module if tensors[0] in _PARAMETERS else f"{module}.weight"
        yield Plan(tuple(parts), (Target(name, shape),))
        if tensors[0] in self._biased:
            (tensor,) = tensors  # no architecture has biases in what it fuses
            yield Plan((self._wanted(prefix, tensor, "bias"),), (Target(f"{module}.bias", shape[:1]),))

    def _wanted(self, prefix: str, tensor: str, suffix: str = "weight") -> Wanted:
        architecture = self._architecture
        shape = self._shape(architecture.shapes.get(tensor, _SHAPES[tensor]))
        if suffix == "bias":
            shape = shape[:1]
        shapes = (shape, (1, *shape)) if tensor in _ROWS_OF_ONE else (shape,)
        paired_heads = getattr(self._sizes, _HEADS[tensor]) if tensor in architecture.permuted else 0
        is_shifted = architecture.one_plus_norms and tensor.endswith("_norm")
        return Wanted(f"{prefix}{tensor}.{suffix}", shapes, paired_heads, -1.0 if is_shifted else 0.0)

    def _of_experts(self, module: str, prefix: str, tensor: str) -> Iterator[Plan]:
        """A matrix of all experts of a layer."""
        shape, experts = self._shape(_EXPERT_SHAPES[tensor]), self._sizes.experts
        targets = [Target(f"{module.format(expert=expert)}.weight", shape) for expert in range(experts)]
        if self._architecture.experts_are_apart:
            for expert, target in enumerate(targets):
                yield Plan((Wanted(f"{prefix}{tensor}.{expert}.weight", (shape,)),), (target,))
        else:
            yield Plan((Wanted(f"{prefix}{tensor}_exps.weight", ((experts, *shape),)),), tuple(targets))

    def _of_heads(self, module: str, prefix: str, tensor: str) -> Plan:
        """The norms of all heads of a layer."""
        wanted = self._wanted(prefix, tensor)
        heads, *shape = wanted.shapes[0]
        names = (f"{module.format(head=head)}.weight" for head in range(heads))
        return Plan((wanted,), tuple(Target(name, tuple(shape)) for name in names))

    def _of_packed(self, module: str, prefix: str, tensors: tuple[str, ...]) -> Iterator[Plan]:
        """A matrix of all experts of a layer that stays in MXFP4, and its bias."""
        out, features = self._shape(_EXPERT_SHAPES[tensors[0].removesuffix("_exps")])
        experts, rows = self._sizes.experts, out * len(tensors)
        groups = features // MXFP4_GROUP
        yield Plan(
            tuple(Wanted(f"{prefix}{tensor}.weight", ((experts, out, features),)) for tensor in tensors),
            (
                Target(f"{module}_blocks", (experts, rows, groups, MXFP4_GROUP // 2), "U8"),
                Target(f"{module}_scales", (experts, rows, groups), "U8"),
            ),
            Arrangement.MXFP4,
        )
        yield Plan(
            tuple(Wanted(f"{prefix}{tensor}.bias", ((experts, out),)) for tensor in tensors),
            (Target(f"{module}_bias", (experts, rows)),),
            Arrangement.ALTERNATING,
        )

    def _shape(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(getattr(self._sizes, name) for name in names)
