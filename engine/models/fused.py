"""How checkpoints lay out matrices that they keep as one and models load one by one.

A layout cuts a fused tensor into equal units along its output features and says which of them make up each
matrix, in order. It holds for weights and biases alike, whatever their number format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.models.config import ModelConfig

# Matrix (the last part of its module's name) -> its units.
FusedLayout = Mapping[str, Sequence[int]]


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
