"""One decoder-only model, described by the same fields whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.rope_scaling import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """One way of rotating queries and keys (arXiv:2104.09864).

    Attributes:
        rotary_dim: channels of each head that are rotated, its first ones; the others are left as they are.
        theta, scaling: what their frequencies are made of.
        interleaved: whether channel 2i pairs with 2i + 1, as in GPT-J; else i pairs with i + rotary_dim / 2.
    """

    rotary_dim: int
    theta: float
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ between the layers of one model.

    Attributes:
        rotary: None where a layer does not rotate.
        sliding_window: a token sees itself and this number less one before it; 0 for no limit.
    """

    rotary: RotaryConfig | None
    sliding_window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model.

    Attributes:
        architecture: the class name in config.json's `architectures`.
        head_dim: size of one attention head; not always hidden_size / num_attention_heads.
        max_position_embeddings: the longest context the model was made for.
        layers: each layer's own, from the first to the last.
        attention_scale: what attention scores are multiplied with.
        attention_soft_cap: scaled scores s become cap * tanh(s / cap); 0 for no cap.
        alibi: whether scores fall with the distance between key and query (arXiv:2108.12409).
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
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    layers: tuple[LayerConfig, ...]
    attention_scale: float
    attention_soft_cap: float = 0.0
    alibi: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def rotaries(self) -> tuple[RotaryConfig, ...]:
        """The ways in which layers rotate, each once, in the order of the layers."""
        used = (layer.rotary for layer in self.layers)
        return tuple(dict.fromkeys(rotary for rotary in used if rotary is not None))
