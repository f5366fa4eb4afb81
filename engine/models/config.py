"""One decoder-only model, described by the same fields whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.expert_config import GatedActivation
from engine.layers.norm_config import NormConfig
from engine.layers.rope_scaling import RopeScaling
from engine.quant.config import Quantization


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
class ExpertsConfig:
    """The experts of a layer (arXiv:1701.06538).

    Attributes:
        num_experts, top_k: how many there are, and how many of them a token uses.
        intermediate_size: channels of each.
        activation: of each.
        bias, router_bias: whether the experts' projections, and the router, have a bias.
        renormalise: whether the weights of a token's experts add up to 1.
        shared_size: channels of an expert that every token uses too, as much as a gate of its own says; 0 for
            no such expert.
        weight_format: "" where their weights are plain numbers, or "mxfp4".
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: GatedActivation
    bias: bool = False
    router_bias: bool = False
    renormalise: bool = True
    shared_size: int = 0
    weight_format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ between the layers of one model.

    Attributes:
        rotary: None where a layer does not rotate.
        sliding_window: a token sees itself and this number less one before it; 0 for no limit.
        experts: None where its feed-forward part is the same for all tokens.
    """

    rotary: RotaryConfig | None
    sliding_window: int = 0
    experts: ExpertsConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model.

    Attributes:
        architecture: the class name in config.json's `architectures`; of a model with another head, that of
            the same decoder with an output projection.
        head_dim: size of one attention head; not always hidden_size / num_attention_heads.
        max_position_embeddings: the longest context the model was made for.
        longest_context: the longest that may be asked for, where the rotation stretches with the context that
            is served; 0 where it is the same.
        norm: how its layers normalise.
        norm_inputs, norm_outputs: whether attention and feed-forward part normalise what they read, and what
            they add to the residual stream.
        parallel_residual: whether attention and feed-forward part of a layer read the same input.
        activation: of the feed-forward part's gate: "silu", "gelu" or "gelu_tanh".
        layers: each layer's own, from the first to the last.
        attention_scale: what attention scores are multiplied with.
        attention_soft_cap: scaled scores s become cap * tanh(s / cap); 0 for no cap.
        alibi: whether scores fall with the distance between key and query (arXiv:2108.12409).
        attention_sinks: whether each head has one more score, as of a key whose value is zero.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: how queries and keys are normalised before rotation: "heads", each head for itself;
            "layer", so too, but by a layer norm with weights of its own; "projection", all of a token's
            queries together, and so its keys; "" for not at all.
        log_query_positions: a query at position p from here on is multiplied with the logarithm of p + 1 to
            this base (Qwen's logn attention); 0 for none.
        embedding_scale, residual_scale: what embeddings, and what attention and feed-forward part add to the
            residual stream, are multiplied with.
        logit_scale, logit_soft_cap: logits l become l * scale, then cap * tanh(l / cap); 0 for no cap.
        normalise_head: whether the rows of the output projection are scaled to length 1 (Baichuan 2).
        tie_word_embeddings: whether the output projection is the embedding matrix.
        eos_token_ids: every token that ends a completion.
        dtype: the number format the checkpoint was saved in, such as "bfloat16"; "" if it does not say.
        labels: the names of the classes, where there is a classification head.
        has_lm_head: whether there is an output projection.
        quantization: how the weights of linear layers are quantized; None for plain numbers. Of experts,
            their own configuration says it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    longest_context: int = 0
    norm: NormConfig
    norm_inputs: bool = True
    norm_outputs: bool = False
    parallel_residual: bool = False
    activation: str = "silu"
    layers: tuple[LayerConfig, ...]
    attention_scale: float
    attention_soft_cap: float = 0.0
    alibi: bool = False
    attention_sinks: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    log_query_positions: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    normalise_head: bool = False
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    labels: tuple[str, ...] = ()
    has_lm_head: bool = True
    quantization: Quantization | None = None

    @property
    def task(self) -> str:
        """What the model is for: "generate", "classify" or "embed"."""
        if self.labels:
            return "classify"
        return "generate" if self.has_lm_head else "embed"

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def rotaries(self) -> tuple[RotaryConfig, ...]:
        """The ways in which layers rotate, each once, in the order of the layers."""
        used = (layer.rotary for layer in self.layers)
        return tuple(dict.fromkeys(rotary for rotary in used if rotary is not None))
