"""One decoder-only model, described by the same fields whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.rope_scaling import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model.

    Attributes:
        architecture: the class name in config.json's `architectures`.
        head_dim: size of one attention head; not always hidden_size / num_attention_heads.
        max_position_embeddings: the longest context the model was made for.
        rope_theta, rope_scaling: the rotary embedding.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: whether every query and key head is normalised before rotation.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        eos_token_ids: every token that ends a completion.
        dtype: the number format the checkpoint was saved in, such as "bfloat16"; "" if it does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
