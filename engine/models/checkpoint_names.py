"""What checkpoints call the modules of a decoder, and which matrices they keep as one.

Modules here have the names of `decoder.py`, whatever the family. A layout cuts a fused tensor into equal
units along its output features and says which of them make up each matrix, in order. It holds for weights and
biases alike, whatever their number format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.layers.expert_config import ExpertTensors
from engine.models.config import ModelConfig

# Matrix (the last part of its module's name) -> its units.
FusedLayout = Mapping[str, Sequence[int]]

# Matrix -> (the module here that it is a shard of, shard).
_SHARDS = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "down_proj": ("down_proj", "down"),
}
_MATRICES = {place: name for name, place in _SHARDS.items()}


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """What a family's checkpoints call modules.

    Attributes:
        renamed: parts of a module's path here -> what stands there in checkpoints, such as "self_attn.o_proj"
            -> "attn.c_proj". Each takes what those before it made of the path.
        split: of modules that checkpoints fuse, their own name there -> the matrices that they hold, such as
            "W_pack" -> qkv_in_turn.
        ignored: ends of names of tensors that carry nothing to load.
        others: beginnings of names of tensors that belong to other parts than the language model.
        left_out: how names here begin, such as "model.", where checkpoints leave that out.
        experts: how they keep the matrices of experts.
        head_norms_are_split: whether there is a tensor for each head where heads have norms of their own.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, Callable[[ModelConfig], FusedLayout]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    left_out: str = ""
    experts: ExpertTensors = field(default_factory=ExpertTensors)
    head_norms_are_split: bool = False

    def module(self, layer: str, shard: str = "") -> str:
        """What checkpoints call a layer, or one of the matrices of a fused layer.

        Args:
            layer: its full name here, such as "model.layers.3.self_attn.qkv_proj".
            shard: such as "q", "7.gate" for an expert's, or "3" for that of a head; "" where the layer is not
                fused.
        """
        path = layer
        if shard.isdecimal():
            path = f"{layer}.{shard}"
        elif shard:
            parent, _, own_name = layer.rpartition(".")
            expert, _, matrix = shard.rpartition(".")
            path = f"{parent}.{expert}.".replace("..", ".") + _MATRICES[own_name, matrix]
        path = f".{path}."
        for ours, theirs in self.renamed.items():
            path = path.replace(f".{ours}.", f".{theirs}.")
        return path[1:-1].removeprefix(self.left_out)

    def tensor(self, layer: str, parameter: str, shard: str = "") -> str:
        """What checkpoints call a parameter of a layer, or of one of its matrices; see `module`."""
        module = self.module(layer, shard)
        if shard or not layer.rpartition(".")[0].endswith(".experts"):
            return f"{module}.{parameter}"
        # All experts' matrices in one tensor, which is no module's weight.
        return module if parameter == "weight" else f"{module}_{parameter}"

    def ignores(self, tensor: str) -> bool:
        """Whether a checkpoint's tensor carries nothing to load."""
        return tensor.endswith(self.ignored) or tensor.startswith(self.others)


def qkv_in_turn(config: ModelConfig) -> FusedLayout:
    """All query heads, then all key heads, then all value heads: Phi-3's qkv_proj, Baichuan's W_pack,
    ChatGLM's query_key_value, Qwen's c_attn."""
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    values = num_heads + num_kv_heads
    return {
        "q_proj": range(num_heads),
        "k_proj": range(num_heads, values),
        "v_proj": range(values, values + num_kv_heads),
    }


def qkv_by_group(config: ModelConfig) -> FusedLayout:
    """For each key-value head its query heads, itself and its value head: GPT-NeoX's query_key_value, where
    each has one query head, and InternLM2's wqkv."""
    group = config.num_attention_heads // config.num_key_value_heads
    firsts = range(0, config.num_key_value_heads * (group + 2), group + 2)
    return {
        "q_proj": [first + head for first in firsts for head in range(group)],
        "k_proj": [first + group for first in firsts],
        "v_proj": [first + group + 1 for first in firsts],
    }


def gate_then_up(config: ModelConfig) -> FusedLayout:
    """Phi-3's gate_up_proj, ChatGLM's dense_h_to_4h."""
    return {"gate_proj": [0], "up_proj": [1]}
